"""Break the package in one place after another, and see that the default run of the tests notices.

    python -m tests.mutation                     every fault of the table
    python -m tests.mutation filter distributed    those in the files whose paths have these words

A fault is one that matters: a wrong sign, bound, mask or label test, a step that is left out. For
each, the default run goes through a copy of the checkout that has it, the nearest tests first, and
ends with the first failure; on every core a copy is at work. The exit status says whether every
fault was noticed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# What is likely to notice.
KERNELS = [
    "tests/test_selfcheck.py::test_every_kernel_passes_in_the_interpreter",
    "tests/kernels/test_forces.py",
    "tests/test_sketch.py",
    "tests/test_functional.py",
]
LABELS = [
    "tests/test_robustness.py::test_the_totals_of_two_fields_are_one",
    "tests/test_robustness.py::test_counts_of_40_billion_pairs_are_exact",
    "tests/test_robustness.py::test_labels_of_a_memory_bank_are_any",
    "tests/test_robustness.py::test_labels_out_of_range_show",
]
NARROW = "tests/test_without_float64.py"
NEAREST = {
    "pack.py": ["tests/test_module.py", *KERNELS],
    "total.py": [*LABELS, *KERNELS],
    "kernels": KERNELS,
    "distributed.py": ["tests/test_distributed.py"],
    "operators.py": ["tests/test_module.py", "tests/test_functional.py", *LABELS, NARROW],
    "module.py": ["tests/test_trainers.py", "tests/test_module.py", "tests/test_distributed.py"],
    "": [
        "tests/test_torch_backend.py",
        "tests/test_sketch.py",
        "tests/test_functional.py",
        *LABELS,
        NARROW,
    ],
}

# By file: what stands in it once, and what to put there instead.
FAULTS: dict[str, list[tuple[str, str]]] = {
    "kernels/pack.py": [
        ("first = inside & (index < B)", "first = inside & (index <= B)"),
        ("((index - B) * stride_rn)", "(index * stride_rn)"),
        ("x.to(real) + tl.load(rest_ptr", "x.to(real) - tl.load(rest_ptr"),
        ("squares += x * x", "squares = x * x"),
        ("tl.maximum(tl.sqrt(tl.sum(squares, 1)), EPSILON)", "tl.sqrt(tl.sum(squares, 1))"),
        ('tl.where(length < float("inf"), length, float("nan"))', "length"),
        ("1.0 / length, mask=rows < N", "length, mask=rows < N"),
        ("x = x / length[:, None]", "x = x * length[:, None]"),
        ("error = x.to(real) - coarse.to(real)", "error = x.to(real) - x.to(real)"),
        ("sq_norm += coarse.to(real) * coarse.to(real)", "sq_norm += x.to(real) * x.to(real)"),
        ('tl.sum(sq_norm, 1), float("nan"))', "tl.sum(sq_norm, 1), 0.0)"),
        ("1.2e-38)) * 1.001", "1.2e-38)) * 0.5"),
        ("tl.minimum(first + TILE, N) - 1", "first"),
        ("if first % TILE == 0 and first < N:", "if first < N:"),
        ("lost = sketch - rounded", "lost = rounded - rounded"),
        ("accumulation * tl.sqrt(norm.to(tl.float32))", "0.0"),
        ("(reach + radius) * radius", "reach * radius"),
        ("0.25 * reach * reach", "0.24 * reach * reach"),
        ("given - 0.5 * square + slack", "given - 0.6 * square + slack"),
        ("+ slack * (given + square)", ""),
        ('tl.where(rows < N, lift, float("-inf"))', "lift"),
        ("lift - high, 0.0)", "0.0 * high, 0.0)"),
        ("tl.load(totals_ptr + 6)", "0 * tl.load(totals_ptr + 5)"),
        ("(2.0 if TWICE else 1.0)", "1.0"),
        ("/ tl.cast(pairs, real)", "/ 1.0"),
        ("factor = factor * inverse", "factor = factor / 1.0"),
        ("inverse * EPSILON < 0.999", "inverse * EPSILON < 2.0"),
        ("grad = grad - along[:, None] * y", "grad = grad + along[:, None] * y"),
        ("mask=inside & (rows < B)[:, None]", "mask=inside & (rows <= B)[:, None]"),
        ("mask = inside & (rows >= B)[:, None]", "mask = inside & (rows > B)[:, None]"),
    ],
    "kernels/filter.py": [
        ("(n & -64) | ((n & 32) >> 2) | ((n & 24) << 1) | (n & 7)", "n"),
        ("4 * tl.arange(0, TILES_N // 4)", "3 * tl.arange(0, TILES_N // 4)"),
        ("first = tl.program_id(1) * STRIP", "first = tl.program_id(1) * STRIP + 1"),
        ("tl.minimum(first + STRIP, blocks_y)", "tl.minimum(first + STRIP, blocks_y - 1)"),
        ("block_x * BLOCK_M // BLOCK_N)", "block_x * BLOCK_M // BLOCK_N + 1)"),
        ("tl.max(tl.max(tl.max(product, 7), 4), 1)", "tl.min(tl.max(tl.max(product, 7), 4), 1)"),
        ("largest < 0, 0,", "largest < 0.02, 0,"),
        ("return a | b", "return a & b"),
        ("(above_ptr + 2 * block_y)", "(above_ptr + block_y)"),
        ("(word[:, None] >> tile_y[None, :])", "(word[:, None] >> tile_x[:, None])"),
        (">= (block_x + 1) * BLOCK_M", "> (block_x + 1) * BLOCK_M"),
    ],
    "kernels/plan.py": [
        ("tile_y % 2 * 4)) & 15", "tile_y % 2 * 4)) & 7"),
        ("exists & (is_near | shares_label)", "exists & is_near"),
        ("(is_near | shares_label)).to", "shares_label).to"),
        ("x_first_label <= y_last_label", "x_first_label < y_last_label"),
        ("y_first_label <= x_last_label", "y_first_label < x_last_label"),
        ("exists = tile_y < tiles_y", "exists = tile_y < tiles_y - 1"),
        ("count += _active_tiles(", "count = _active_tiles("),
        ("more = tl.maximum(count - 1, 0) // budget", "more = count // budget"),
        ("before += tl.sum(more, 0)", "before = tl.sum(more, 0)"),
        ("before + tl.cumsum(more, 0)", "before + more"),
        ("tl.load(extra_ptr + tile_x - 1, mask=tile_x > 0, other=0)", "0 * tile_x"),
        ("energy += tl.load(energy_ptr + part)", "energy -= tl.load(energy_ptr + part)"),
        ("attracting += tl.load(attracting_ptr + part)", "attracting += 0"),
        ("repelling += tl.load(repelling_ptr + part)", "repelling += 0"),
        ("own_class += tl.load(own_class_ptr + part)", "own_class += 0"),
        ("tl.minimum(nearest, tl.load(nearest_ptr + part))", "nearest"),
        ("grad += tl.load(grad_ptr + part", "grad -= tl.load(grad_ptr + part"),
    ],
    "kernels/forces.py": [
        ("mask=tile_x > 0, other=0)", "mask=tile_x >= 0, other=0)"),
        ("stiffness = alpha * phi * inverse * inverse", "stiffness = alpha * phi * inverse"),
        ("stiffness = inverse * inverse", "stiffness = inverse"),
        ("phi = tl.log(inverse)", "phi = -tl.log(inverse)"),
        ("phi * tl.exp2(residue", "phi * tl.exp2(-residue"),
        ("for power in tl.static_range(ALPHA)", "for power in tl.static_range(ALPHA + 1)"),
        ("mask=(d < D)[None, :], other=0.0", "mask=(d <= D)[None, :], other=0.0"),
        ("tl.load(extra_ptr + middle) <= extra", "tl.load(extra_ptr + middle) < extra"),
        ("begin = (extra - before + 1) * budget", "begin = (extra - before) * budget"),
        ("end = begin + budget", "end = begin + budget - 1"),
        ("(rank >= begin) & (rank < end)", "(rank > begin) & (rank < end)"),
        ("product = tl.dot(a, b, product)", "product = tl.dot(a, b)"),
        ("coarse_d2 = norms - 2.0 * product", "coarse_d2 = norms - 1.9 * product"),
        ("outer = rep_radius + margin", "outer = rep_radius"),
        ("inner = tl.maximum(att_radius - margin, 0.0)", "inner = att_radius - margin"),
        ("margin = x_radius[:, None] + ", "margin = 0 * x_radius[:, None] + "),
        ("inner * inner - slack * norms", "inner * inner"),
        ("outer * outer + slack * norms", "outer * outer"),
        ("y_label[None, :]) & (cols < M)", "y_label[None, :]) & (cols <= M)"),
        ("own_class += tl.sum(same.to(tl.int32), 1)", "own_class = tl.sum(same.to(tl.int32), 1)"),
        ("in_y[None, :] == column[:, None], 0", "in_y[None, :] >= column[:, None], 0"),
        ("(d2 >= att_sq_radius)", "(d2 > att_sq_radius)"),
        ("(d2 < rep_sq_radius)", "(d2 <= rep_sq_radius)"),
        (
            "attracts = taken & (x_label == chosen_label)",
            "attracts = taken & (x_label >= chosen_label)",
        ),
        ("repels = taken & (x_label != chosen_label)", "repels = taken & (x_label < chosen_label)"),
        ("repels = taken &", "repels ="),
        ("tl.where(repels, tl.minimum(nearest, d2), nearest)", "tl.minimum(nearest, d2)"),
        ("clipped = tl.maximum(d2, core_sq_radius)", "clipped = d2"),
        ("tl.fma(0.5 * stiffness, clipped - d2, phi)", "phi"),
        ("tl.where(attracts, -phi,", "tl.where(attracts, phi,"),
        ("tl.where(repels, -stiffness, 0.0)", "tl.where(repels, stiffness, 0.0)"),
        ("grad[i] + weight[:, None] * difference", "weight[:, None] * difference"),
        ("energy += tile_energy", "energy = tile_energy"),
        (
            "depths = (first_slice + i) * BLOCK_D + d\n                            y =",
            "depths = i * BLOCK_D + d\n                            y =",
        ),
        ("out_row = x_order", "out_row = rows.to(tl.int64)"),
        ("mask=owned[:, None] & (depths < D)[None, :]", "mask=owned[:, None]"),
    ],
    "kernels/total.py": [
        ("(sq_norm * 4).to(tl.float64) * 0", "sq_norm.to(tl.float64) * 0"),
        ("other=0.0).to(tl.float64) - constants", "other=0.0).to(tl.float64)"),
        ("* att_constant + repels", "* att_constant - repels"),
        ("attracting += attracts", "attracting = attracts"),
        ("repelling += repels", "repelling = repels"),
        ("nearest = tl.minimum(nearest, near)", "nearest = near"),
        ("nothing += _nothing(tl.load(x_sq_norm_ptr", "_nothing(tl.load(x_sq_norm_ptr"),
        ("nothing += _nothing(tl.load(y_sq_norm_ptr", "_nothing(tl.load(y_sq_norm_ptr"),
        ("active += tl.load(active_ptr", "active = tl.load(active_ptr"),
        ("tl.sum(own_class, 0) - (N if AMONG else 0)", "tl.sum(own_class, 0)"),
        ("(M - 1 if AMONG else M)", "M"),
        ("tl.cast(N, tl.int64) * (M", "N * (M"),
        ("tl.minimum(distance, tl.load(before_ptr + 3))", "distance"),
        ("total += tl.load(before_ptr + 5)", "total += 0"),
        ("none += tl.load(before_ptr + 6)", "none += 0"),
        ("(total + none)", "total"),
        ("(label < 0) | (label >= classes)", "label >= classes"),
        ("(label < 0) | (label >= classes)", "(label < 0) | (label > classes)"),
        ("outside += ((label", "outside = ((label"),
        ('tl.where(wrong > 0, float("nan"), 0.0)', "0.0"),
        ("out_of_range += tl.load(before_ptr + 8)", "out_of_range += 0"),
        ("total = total / tl.cast(pairs, tl.float64)", "total = total / 1.0"),
        ("tl.cast(high, tl.float64) + tl.cast(low, tl.float64)", "tl.cast(high, tl.float64)"),
    ],
    "kernels/launch.py": [
        ("x if x.stride(1) == 1 else x.contiguous()", "x"),
        ("rest = rest if rest.stride(1) == 1 else rest.contiguous()", "pass"),
        ("torch.sort(labels, stable=True)", "torch.sort(labels, descending=True)"),
        ("REACH * potential.repulsion_radius", "potential.delta"),
        ("extra, programs if needs_grad else 1)", "extra, 1)"),
        ("MUTUAL=acting is acted_on", "MUTUAL=True"),
        ("is_padded = not dim == depth", "is_padded = dim == depth"),
        ("_cdiv(dim, tiles.block_k) * tiles.block_k", "dim // tiles.block_k * tiles.block_k"),
        ("alpha, alpha - integer,", "alpha, integer - alpha,"),
        ("OTHERS=acting is not acted_on", "OTHERS=False"),
        ("strip *= 2", "break"),
        ("labels.contiguous(), value, totals", "labels, value, totals"),
    ],
    "sketch.py": [
        ("REACH = 1.001", "REACH = 0.999"),
        ("SLACK = 2.0**-14", "SLACK = 0.0"),
        ("_SHRINK = 0.96", "_SHRINK = 1.0"),
        ("8 * (dim + 16) * 2.0**-23", "0.0"),
        (".abs().sum(0).amax() <= 1", ".abs().amax() <= 1"),
        ("torch.where(_is_sound(rounded), rounded,", "torch.where(rounded.isfinite(), rounded,"),
        ("return torch.where(_is_sound(turned), turned, basis)", "return turned"),
        ("centred = centred - centred.mean(0)", "centred = centred * 1"),
        ("image = centred.T @ (centred @ old)", "image = -(old * 0)"),
        ("solve_triangular(lower.T, wide", "solve_triangular(lower.T, 0 * wide"),
        (".mul_(1.001).add_(error)", ".add_(error).mul_(0)"),
        ("given - 0.5 * square", "given - 0.51 * square"),
        ("lift = torch.where(square.isfinite(), lift, torch.inf)", "pass"),
        ("lift - high.float())", "0 * high.float())"),
        ("else x.cpu()).double()", "else x).double()"),
    ],
    "torch_backend.py": [
        ("length += length * 0", "pass"),
        ("inverse = length.clamp_min_(EPSILON)", "inverse = length"),
        ("points = points * inverse[:, None]", "points = points / inverse[:, None]"),
        ("with torch.autocast(acted_on.points.device.type, enabled=False)", "with torch.no_grad()"),
        ("active[start : start + height] = False", "pass"),
        ("selves = n if among else 0", "selves = 0"),
        ("if acting is not acted_on:\n        nothing", "if False:\n        nothing"),
        ("totals[3] = nearest", "pass"),
        ("nothing = nothing.masked_fill(outside > 0, torch.nan)", "pass"),
        ("totals[5] / pairs + totals[6]", "totals[5] / pairs"),
        ("(2 if twice else 1) / pairs", "1 / pairs"),
        ("/ pairs) + totals[6])", "/ pairs))"),
        ("along[:, None], y, value=-1)", "along[:, None], y, value=1)"),
        ("(shrunk * EPSILON < 0.999)", "(shrunk * EPSILON < 2)"),
        ("factor * shrunk", "factor * 1"),
        ("acting.labels, acted_on.labels, right=True", "acting.labels, acted_on.labels"),
        ("(first_x[:, None] <= last_y)", "(first_x[:, None] < last_y)"),
        (".amax((1, 3))", ".amin((1, 3))"),
        ("return active | active.T if mutual else active", "return active"),
        ("below = tiles < 0", "below = tiles < 0.02"),
        ("points @ basis.float(), error * norm", "points @ basis.float(), 0 * norm"),
        ("padded[:, lift] = -torch.inf", "padded[:, lift] = torch.inf"),
        ("return slack if _multiplies_exactly(dtype) else slack + 2.0**-5", "return slack"),
        ("slack = 8 * (depth + 8) * torch.finfo(dtype).eps", "slack = 0.0"),
        ("potential.delta**2 - margin", "potential.delta**2"),
        ("d2 < potential.repulsion_radius**2 + margin", "d2 < potential.repulsion_radius**2"),
        (
            "nominated &= exists_x[:, :, None] & exists_y[:, None, :]",
            "nominated &= exists_x[:, :, None]",
        ),
        ("many &= exists_x.all(1) & exists_y.all(1)", "pass"),
        ("nominated[t] = False", "pass"),
        ("if tile_x.dtype != widest(tile_x.device)", "if tile_x.dtype != torch.float64"),
        ("dtype != widest(y.device)", "dtype != torch.float64"),
        ("torch.stack([widened(t) for", "torch.stack([t.double() for"),
        ("widened(psi)", "psi.double()"),
        ("less = 0.5 * (1 - _slack(depth, dtype))", "less = 0.5"),
        ("near = -0.5 * potential.repulsion_radius**2", "near = -0.5 * potential.delta**2"),
        ("other = labels[i] != acting.labels[j]", "other = labels[i] > acting.labels[j]"),
        ("acting.labels, labels, right=True) - first", "acting.labels, labels) - first"),
        ('part.nearest, "amin")', 'part.nearest, "amax")'),
        ("torch.minimum(terms.nearest, part.nearest, out=terms.nearest)", "pass"),
        ("repels = active & ~same[part]", "repels = active"),
        ("(active & same[part]).long()", "active.long()"),
        ("difference.mul_(w[:, None])", "difference.mul_(-w[:, None])"),
        ("4 * (depth + 8) * torch.finfo(torch.float64).eps * norms", "0 * norms"),
        ("close = active.logical_or(unsure)", "close = active.logical_and(unsure)"),
        ("psi[t, i, j] = 0", "pass"),
        ("w[t, i, j] = 0", "pass"),
        ("active[t, i, j] = False", "pass"),
        ("wide_x, w, wide_y, alpha=-1", "wide_x, w, wide_y, alpha=1"),
        ("torch.where(repels, d2, torch.inf).amin(2)", "d2.amin(2)"),
    ],
    "potential.py": [
        ("d2 >= att2", "d2 > att2"),
        ("d2 < rep2", "d2 <= rep2"),
        ("clipped = d2.clamp_min(core2)", "clipped = d2.clamp_min(1e-30)"),
        ("phi + 0.5 * k * (clipped - d2)", "phi"),
        ("torch.where(same, -phi,", "torch.where(same, phi,"),
        ("torch.where(same, k, -k)", "torch.where(same, k, k)"),
        ("return -0.5 * d2.log(), d2.reciprocal()", "return -d2.log(), d2.reciprocal()"),
        ("self.alpha * phi * inverse * inverse", "self.alpha * phi * inverse"),
        ("inverse.pow(residue) if residue", "inverse.pow(-residue) if residue"),
        ("return -self._phi(self.delta)", "return self._phi(self.delta)"),
        ("return self._phi(self.repulsion_radius)", "return self._phi(self.delta)"),
        ("max(self.alpha, 1.0) * self.min_distance", "self.alpha * self.min_distance"),
        ("+ widened(pairs - own_class)", "- widened(pairs - own_class)"),
        ("+ widened(pairs - own_class)", "+ (pairs - own_class).double()"),
        ("return widened(terms.energy)", "return terms.energy.double()"),
        ('_WITHOUT_FLOAT64 = ("mps",)', "_WITHOUT_FLOAT64 = ()"),
        (".mul_(2).square_() * 0", ".square_() * 0"),
        ("labels = self.labels[: self.batch]", "labels = self.labels"),
        ("(labels < 0) | (labels >= self.classes)", "labels >= self.classes"),
        ("(labels < 0) | (labels >= self.classes)", "(labels < 0) | (labels > self.classes)"),
        ("return high, attraction - high", "return high, 0.0"),
        ("other_high, repulsion - other_high", "other_high, 0.0"),
    ],
    "operators.py": [
        ("check_finite(points, name)", "pass"),
        ("if basis is None and prune:", "if prune:"),
        ("grad = grad.mul_(2).add_(terms.grad)", "grad = grad.add_(terms.grad)"),
        ("twice = sources is None", "twice = True"),
        (
            "first = (grad * (grad_output + nothing)[:, None])",
            "first = (grad * grad_output[:, None])",
        ),
        ("psi = psi + rest_energy(terms.own_class, len(points), potential)", "pass"),
        (
            "nan_unless_finite(queries) + nan_unless_finite(points).sum()",
            "nan_unless_finite(queries)",
        ),
        ("if basis.is_cuda and torch.cuda", "if True or torch.cuda"),
        ("so_far & (so_far - 1) == 0", "so_far & (so_far - 1) == 1"),
        ("n * (n - 1) + (0 if sources", "n * n + (0 if sources"),
        ("n * sources.shape[0]", "sources.shape[0]"),
        ("low < 0 or high >= classes", "low < 0 or high > classes"),
        ("None if classes is None else Given(labels, points.shape[0], classes)", "None"),
        ("source_labels.clamp(-1, classes)", "source_labels"),
        ("dtype=widest(points.device)", "dtype=torch.float64"),
    ],
    "module.py": [
        (
            "std=self.embedding_size**-0.5)\n\n    def __setattr__",
            "std=1.0)\n\n    def __setattr__",
        ),
        (
            "turn_basis(basis, self._calls, embeddings, self.normalize)",
            "turn_basis(basis, self._calls, embeddings, False)",
        ),
        ("[:, None].repeat(1, shape[1])", ".repeat(shape[1]).view(shape)"),
        ("labels.shape != shape or labels.device", "labels.device"),
        ("if not is_traced():  # a graph", "if True:  # a graph"),
        ("if self.proxies is None or self.proxies.shape != sizes:", "if False:"),
        ('if type(self.proxies).__name__ == "DTensor":', "if False:"),
        ("if self._basis.shape[0] != self.embedding_size:", "if False:"),
        ("ours.copy_(sound_basis(", "self._basis = (sound_basis("),
        (
            "turn_now(self._basis_on(embeddings.device), embeddings, self.normalize)",
            "turn_now(self._basis_on(embeddings.device), embeddings, True)",
        ),
        ("value if check is None else check(name, value))", "value)"),
        ("if not self.prune or is_dry_run():", "if not self.prune:"),
        ("is_exporting() or is_dry_run() or totals.is_meta:", "is_exporting() or totals.is_meta:"),
        ("proxies._version != version:", "False:"),
        (
            "_checksum(proxies).eq(self._bits), non",
            "_checksum(proxies).eq(_checksum(proxies)), non",
        ),
        ("self._unmoved = 0, -1  # fully", "pass  # fully"),
        ("self._calls.copy_(state[:8]", "torch.zeros(()).copy_(state[:8]"),
        (".clamp_min(0))\n", ")\n"),
        ("self.sketch_basis = state[8:]", "_ = state[8:]"),
        ('own["_sent"] = bytes(self.get_extra_state().tolist())', "pass"),
        ("self._unmoved = 0, -1  # for", "pass  # for"),
        ("if is_transformed() or is_dry_run() or proxies.is_meta:", "if False:"),
        ("if isinstance(optimizer, torch.optim.LBFGS):", "if False:"),
        ('rate if name == "step_size" else 0.0', "0.0"),
        (
            "new = table.new_full((num_classes, *table.shape[1:]), of_new)",
            "new = table.new_ones(num_classes, *table.shape[1:])",
        ),
        ("table[classes]", "table[: len(classes)]"),
        ("proxies[len(classes) :].normal_(std=self.embedding_size**-0.5)", "pass"),
        ("optimizer.state[new] = state", "pass"),
        ("group[i] = new", "pass"),
    ],
    "distributed.py": [
        ("if any(news):", "if False:"),
        ("self._is_new |= not self._is_managed", "pass"),
        (
            "super()._load_from_state_dict(*args)\n        self._is_new = True",
            "super()._load_from_state_dict(*args)",
        ),
        ("if len(set(alike)) > 1:", "if False:"),
        ("real = torch.float64 if 8 in widths", "real = torch.float64 if 16 in widths"),
        ("basis=self._basis_for(batch)", "basis=self._basis_for(embeddings)"),
        ("torch.cat([*of_points, of_proxies])", "torch.cat([of_proxies, *of_points])"),
        ("max(n * (n - 1 + len(sources)), 1)", "max(n * (n + len(sources)), 1)"),
        ("if gets_gradient(ref_emb):", "if False:"),
        (
            "most = -(-classes // self.size)\n        return",
            "most = classes // self.size\n        return",
        ),
        ("except BaseException as error:", "except ValueError as error:"),
        ("numbers = [place, int(error is not None), *own]", "numbers = [place, 0, *own]"),
        ("if any(failed) and len(set(places)) == 1:", "if False:"),
        ('own.encode(errors="replace")', "own.encode()"),
        (
            "    except Exception:\n        return type",
            "    except TypeError:\n        return type",
        ),
        (
            "dist.broadcast(x, group=self.group, group_src=0)",
            "dist.broadcast(x, group=self.group, group_src=self.rank)",
        ),
        ("elif not torch.equal(self.proxies, proxies):", "elif False:"),
        ("if length > min(longest):", "if length > max(longest):"),
        ("length = max(*longest, *(", "length = min(*longest, *("),
        ("whole[nearest] = rows[:, nearest].amin()", "pass"),
        ('value.copy_(found["energy"] / pairs + found["nothing"])', "pass"),
        ("grad_output + ctx.step.nothing.to(grad_output.dtype)", "grad_output"),
        ('"cpu" not in dist.get_backend_config(self.group)', "False"),
        ("first * ranks.size", "first"),
        ("            ranks.gather(*rows)\n", "            pass\n"),
        ("second = OnceDifferentiable.apply(second, own)", "pass"),
        ("inputs = points, labels, proxies[", "inputs = points, labels, proxies.detach()["),
        (".clone(memory_format=torch.contiguous_format)", ".contiguous()"),
        ("            self._watch()\n", ""),
        (
            "            finally:\n                ranks.gather(rows, mine)",
            "            finally:\n                pass\n            ranks.gather(rows, mine)",
        ),
    ],
}


class Fault(NamedTuple):
    """`new` stands where `old` did, in a file of the package."""

    file: str
    old: str
    new: str

    @property
    def line(self) -> int:
        """Where it is in the file as it should be."""
        before, found, _ = (ROOT / "pfml_triton" / self.file).read_text().partition(self.old)
        return before.count("\n") + 1 if found else 0


def stale(faults: list[Fault]) -> list[Fault]:
    """Those whose place is not there, or not the only one."""
    texts = {fault.file: (ROOT / "pfml_triton" / fault.file).read_text() for fault in faults}
    return [fault for fault in faults if texts[fault.file].count(fault.old) != 1]


def copy_checkout(to: Path) -> Path:
    """What git tracks, or would."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


def noticed_by(fault: Fault, checkout: Path) -> str:
    """The first test that fails where the fault is, or nothing."""
    file = checkout / "pfml_triton" / fault.file
    right = file.read_text()
    nearest = next(tests for word, tests in NEAREST.items() if word in fault.file)
    try:
        file.write_text(right.replace(fault.old, fault.new))
        return first_failure(checkout, nearest) or first_failure(checkout, [])
    finally:
        file.write_text(right)


def first_failure(checkout: Path, tests: list[str]) -> str:
    """Of some tests, or of the default run."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-n0", "-p", "no:randomly", *tests],
        cwd=checkout, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode == 0:
        return ""
    if ran.returncode < 0:
        crashed = re.search(r"in (test_\w+)$", ran.stderr, re.MULTILINE)
        return f"{signal.Signals(-ran.returncode).name} in {crashed and crashed[1]}"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
    if ran.returncode != 1 or failed is None:
        raise RuntimeError(f"pytest ended with {ran.returncode}:\n{ran.stdout}\n{ran.stderr}")
    return failed[1]


def main(words: list[str]) -> int:
    faults = [
        Fault(file, *change)
        for file, changes in FAULTS.items()
        for change in changes
        if not words or any(word in file for word in words)
    ]
    if gone := stale(faults):
        print(*(f"{file}: not there once: {old!r}" for file, old, _ in gone), sep="\n")
        return 2
    cores = os.cpu_count() or 1
    seconds, missed = [], []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(cores) as pool:
        checkouts: SimpleQueue[Path] = SimpleQueue()
        for core in range(cores):
            checkouts.put(copy_checkout(Path(folder, str(core))))

        def tried(fault: Fault) -> tuple[Fault, str, float]:
            checkout, started = checkouts.get(), time.monotonic()
            try:
                return fault, noticed_by(fault, checkout), time.monotonic() - started
            finally:
                checkouts.put(checkout)

        running = [pool.submit(tried, fault) for fault in faults]
        for i, done in enumerate(as_completed(running)):
            fault, test, took = done.result()
            (seconds if test else missed).append(took)
            change = f"{' '.join(fault.old.split())!r} -> {' '.join(fault.new.split())!r}"
            print(
                f"{i + 1}/{len(faults)} {fault.file}:{fault.line} {change}\n"
                f"    {took:.0f} s  {test or 'NOT NOTICED'}",
                flush=True,
            )
    print(f"{len(seconds)} of {len(faults)} noticed, in {median(seconds or [0]):.0f} s (median)")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
