"""The process in which the kernels run in Triton's interpreter: prints what it found, as JSON."""

from . import as_found, in_interpreter

if __name__ == "__main__":
    print(as_found(in_interpreter()))
