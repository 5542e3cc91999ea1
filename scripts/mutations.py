"""What scripts/mutation_check.py breaks: every mutation of the library, and the tests that should notice it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`find`, which occurs once in `file`, becomes `put`; the tests that should notice run first."""

    file: str
    find: str
    put: str
    tests: str

    def applied(self, text: str) -> str | None:
        """The mutated source, or None where `find` does not occur exactly once."""
        return text.replace(self.find, self.put) if text.count(self.find) == 1 else None


ANSWERS, GRADIENTS, IDENTITY = "test_laws_answers.py", "test_laws_gradients.py", "test_laws_identity.py"
MERGE, TIED, INIT = "test_merge_laws.py", "test_merge_tied.py", "test_init.py"
REFUSALS = "test_merge_refusals.py"
FUSED, CHECKPOINTING = "test_fused_rows.py", "test_injection_checkpointing.py"
TOGETHER, PIECES, WRAPPERS = "test_together.py", "test_pieces.py", "test_wrappers.py"
GPU, ACCELERATE = "test_gpu_kernels.py", "test_accelerate.py"
SCALE, PRETRAINED, FAILURES = "test_one_scale.py", "test_pretrained.py", "test_load_failures.py"
CHECKPOINTING, CAST, DROPOUT = "test_injection_checkpointing.py", "test_autocast.py", "test_dropout.py"
FEW, READ = "test_few_rows.py", "test_weights_read.py"
REPLACED, THREADS = "test_replaced_modules.py", "test_nesting_and_threads.py"
CHUNKED, PREFERENCE, PROCESSES = "test_chunked_loss.py", "test_preference.py", "test_processes.py"
RESUME, CHECKPOINTS = "test_resume.py", "test_checkpoints.py"
CAPTURE = "train/state/capture.py"

MUTATIONS: dict[str, Mutation] = {
    "merge: no scale": Mutation("core/merging.py", "factors.scale * weighting", "weighting", MERGE),
    "merge: one adapter of several": Mutation(
        "core/merging.py", "for change in changes:", "for change in changes[:1]:", MERGE
    ),
    "merge: not transposed": Mutation("core/merging.py", "(a.mT, b.mT) if transposed", "(b, a) if transposed", MERGE),
    "merge: sums in the weight's dtype": Mutation(
        "core/merging.py",
        "total = torch.empty(base.shape, dtype=wide, device=base.device)",
        "total = torch.empty(base.shape, dtype=base.dtype, device=base.device)",
        MERGE,
    ),
    "merge: not finite is not refused": Mutation(
        "merge/memory.py", "if not _finite(layer, name)", "if False", REFUSALS
    ),
    "merge: overflow is not refused": Mutation(
        "merge/overflow.py", "if bound < 0.99 * limit or", "if True or", REFUSALS
    ),
    "merge: stays tied": Mutation("merge/memory.py", "    part_tied_weights(model)\n", "", TIED),
    "merge: a tied weight is written for both": Mutation(
        "merge/memory.py", "id(layer.base_weight) in shared, plain", "False, plain", TIED
    ),
    "merged: base not put back": Mutation(
        "layers/base.py",
        "            self._put(weight)\n            self.activate(active)",
        "            self.activate(active)",
        IDENTITY,
    ),
    "resized: the change of old rows is lost": Mutation(
        "injection/presence.py",
        "torch.cat([tensor, tensor.new_zeros(shape)], dim=along)",
        "tensor.new_zeros(shape)",
        REPLACED,
    ),
    "replaced: not noticed": Mutation("injection/presence.py", "if id(place.module) not in present or", "if", REPLACED),
    "threads: a forward does not wait": Mutation(
        "injection/turnstile.py", "if (self._waiting or self._owner is not None) and", "if False and", THREADS
    ),
    "threads: a switch does not wait": Mutation(
        "injection/turnstile.py", "self._owner is not None or self._due or self._others()", "False", THREADS
    ),
    "merged: a copy keeps the folded weight": Mutation(
        "layers/base.py", '{**state["_parameters"], self.weight_name: weight}', 'state["_parameters"]', THREADS
    ),
    "read: W0 for everybody": Mutation(
        "layers/reading.py", "WeightAsRead.of(layer) if is_read_by_a_forward(layer) else weight", "weight", READ
    ),
    "read: a layer's own forward sees the change too": Mutation("layers/reading.py", "runs is layer", "False", READ),
    "read: no scale": Mutation(
        "core/merging.py",
        "add(total, left, right, alpha=factors.scale)",
        "add(total, left, right)",
        READ,
    ),
    "read: an extension's gradient is lost": Mutation(
        "layers/reading.py", "torch.autograd.backward(weight, gradient)", "pass", READ
    ),
    "factors: no start factors": Mutation(
        "core/factors.py", "torch.cat([a, a - self.start_a], dim=-2)", "torch.cat([a, a], dim=-2)", ANSWERS
    ),
    "factors: start factors added": Mutation(
        "core/factors.py", "-self.full_b(self.start_b)", "self.full_b(self.start_b)", ANSWERS
    ),
    "rows: start ignored": Mutation("core/rows.py", " * stride + self.start", " * stride", ANSWERS),
    "scaling: rslora as lora": Mutation(
        "core/scaling.py", "alpha / math.sqrt(rank) if rslora", "alpha / rank if rslora", ANSWERS
    ),
    "dora: gain one": Mutation(
        "core/dora.py", "return magnitude.to(norms.dtype) / ", "return torch.ones_like(norms) + 0 * ", ANSWERS
    ),
    "dora: half the cross term": Mutation("core/dora.py", "2 * scale * cross", "scale * cross", ANSWERS),
    "dora: bias scaled too": Mutation("core/dora.py", "torch.addcmul((1 - gain) * bias, gain, h)", "gain * h", ANSWERS),
    "linear: no scale": Mutation("layers/linear.py", "(*f.moved(), f.scale)", "(*f.moved(), 1.0)", ANSWERS),
    "linear: one adapter of several": Mutation("kernels/fused.py", "if len(pairs) == 1:", "if True:", ANSWERS),
    "linear: parts not put on their rows": Mutation(
        "core/factors.py",
        "full.index_copy(-2, row_indices(self.parts, b.device), torch.cat(padded, dim=-2))",
        "full",
        ANSWERS,
    ),
    "linear: no start factors": Mutation(
        "core/factors.py", "torch.cat([b - start_b, start_b], dim=-1)", "torch.cat([b, start_b], dim=-1)", ANSWERS
    ),
    "linear: dropout in evaluation": Mutation(
        "layers/linear.py", "factors.dropout, self.training)", "factors.dropout, True)", GRADIENTS
    ),
    "fused: no bias": Mutation(
        "kernels/fused.py",
        "plus_low_rank(x, rows, matrix, bias, s,",
        "plus_low_rank(x, rows, matrix, None, s,",
        ANSWERS,
    ),
    "fused: no mask in backward": Mutation(
        "kernels/fused.py", "weight_gradient(ds, seen_by_a(x, mask))", "weight_gradient(ds, x)", GRADIENTS
    ),
    "fused: input gradient of the base alone": Mutation(
        "kernels/fused.py",
        "Part(dh, ctx.stored or weight, ds, a, mask)",
        "Part(dh, ctx.stored or weight, 0 * ds, a, mask)",
        GRADIENTS,
    ),
    "together: no scale": Mutation(
        "kernels/group.py",
        "for b, scale in zip(masters_b, scales, strict=True)]",
        "for b, _ in zip(masters_b, scales, strict=True) for scale in [1.0]]",
        TOGETHER,
    ),
    "together: no bias": Mutation(
        "kernels/group.py", "forward_part(x, rows, weight, bias,", "forward_part(x, rows, weight, None,", TOGETHER
    ),
    "together: input gradient of the base alone": Mutation(
        "kernels/group.py", "Part(dh, frozen[i], ds[i],", "Part(dh, frozen[i], 0 * ds[i],", TOGETHER
    ),
    "together: dB not scaled": Mutation(
        "kernels/group.py", "laid_out_as_b(dbt, ctx.scales[i],", "laid_out_as_b(dbt, 1.0,", TOGETHER
    ),
    "together: answers out of date": Mutation(
        "kernels/together.py", "ready.versions == own.versions()", "True", TOGETHER
    ),
    "together: an answer of another scale": Mutation(
        "kernels/together.py", "same and self[4:] == others[4:]", "same", TOGETHER
    ),
    "together: waits for ever": Mutation(
        "kernels/together.py", "            _settled.add(first)", "            pass", TOGETHER
    ),
    "together: parts of dX as they come": Mutation(
        "kernels/shared_input.py", "max(self._due, default=-1)", "-1", TOGETHER
    ),
    "together: parts of dX in the order that was learned": Mutation(
        "kernels/group.py", "parts = {places[i]: Part", "parts = {i: Part", TOGETHER
    ),
    "together: an answer for another sum": Mutation("kernels/together.py", "if current and", "if", TOGETHER),
    "together: never": Mutation("kernels/together.py", "followers is not None and (", "False and (", TOGETHER),
    "together: under checkpointing too": Mutation(
        "kernels/hooks.py", "return _top is None or _top(True) is not None", "return False", TOGETHER
    ),
    "fused: no empty answer for a block computed again": Mutation(
        "kernels/fused.py", "= [] if are_saved_tensors_watched() else None", "= None", CHECKPOINTING
    ),
    "dB: blocks of columns in another order": Mutation(
        "kernels/products.py", ".reshape(s.shape[1], -1)", ".flip(1).reshape(s.shape[1], -1)", "test_kernels.py"
    ),
    "dB: turned by a copy without the scale": Mutation(
        "kernels/fused.py", "turned.contiguous().mul_(scale)", "turned.contiguous()", "test_kernels.py"
    ),
    "few rows: dropout without its mask": Mutation("kernels/fused.py", "x.to(wide) * mask.numbers(x.shape)", "x", FEW),
    "few rows: no scale": Mutation("kernels/fused.py", "a.to(wide)) * scale", "a.to(wide))", FEW),
    "few rows: never": Mutation("kernels/fused.py", "few_rows(x) and not isinstance", "False and not isinstance", FEW),
    "dropout: what is kept not scaled": Mutation("kernels/fused.py", "scale /= mask.kept", "pass", DROPOUT),
    "dropout: digits from the first to the last": Mutation(
        "kernels/dropout.py", "zip(digits[::-1][place:], fair", "zip(digits[place:], fair", DROPOUT
    ),
    "dropout: dX without the mask": Mutation(
        "kernels/input_gradient.py", "mask.add_product_(dx, stacked, a)", "dx.addmm_(stacked, a)", DROPOUT
    ),
    "dropout: dA of a group without the mask": Mutation(
        "kernels/group.py", "seen_by_a(rows, mask) if any(needs_a[i] for i in live) else rows", "rows", TOGETHER
    ),
    "dropout: every block from the first byte": Mutation(
        "kernels/dropout.py", "start * a.shape[1] // 8)", "0)", DROPOUT
    ),
    "dropout: one mask for two checkpointed blocks": Mutation(
        "kernels/dropout.py", "key = (probability, watcher())", "key = (probability, None)", DROPOUT
    ),
    "dropout: one mask for two blocks of reentrant checkpointing": Mutation(
        "kernels/dropout.py", "if given or x.is_inference()", "if x.is_inference()", DROPOUT
    ),
    "dropout: an answer computed ahead reads no mask": Mutation(
        "kernels/together.py", "            _mask(layer, x, own, share_mask)  #", "            pass  #", TOGETHER
    ),
    "accelerate: one mask for all": Mutation("peft/layer.py", "share_mask=False", "share_mask=True", ACCELERATE),
    "dropout: one mask for ever": Mutation("kernels/dropout.py", " or me in last.readers", "", DROPOUT),
    "dropout: a mask for every projection": Mutation(
        "kernels/together.py", "dropout.shared(own.dropout, x, layer)", "dropout.draw(own.dropout, x)", DROPOUT
    ),
    "gpu: a kernel whatever its answer": Mutation("kernels/gpu/choice.py", "if not off <= CLOSE:", "if False:", GPU),
    "gpu: kernels nobody measured or asked for": Mutation(
        "kernels/gpu/choice.py", 'ASKED == "1" or (', "True or (", GPU
    ),
    "gpu: no groups of tiles": Mutation(
        "kernels/gpu/product.py", "first + program % in_group % group_rows", "program % in_group % group_rows", GPU
    ),
    "autocast: the copy of another tensor": Mutation("kernels/remembered.py", "self._x() is x and ", "", CAST),
    "autocast: a copy out of date": Mutation("kernels/remembered.py", " and self._version == x._version", "", CAST),
    "pieces: the bias always inside": Mutation(
        "kernels/pieces.py", " and x.dim() > 2 and not x.is_contiguous()", " and False", PIECES
    ),
    "pieces: whatever the bits": Mutation(
        "kernels/pieces.py", "if torch.equal(_in_pieces(x, m, bias, start, cut), whole) else None", "", PIECES
    ),
    "pieces: no bias": Mutation("kernels/pieces.py", "if bias_part is None:", "if True:", PIECES),
    "pieces: the last one left out": Mutation(
        "kernels/pieces.py",
        "for x_part, m_part, _, target in _parts(x, m, None, onto, cut):",
        "for x_part, m_part, _, target in _parts(x, m, None, onto, cut)[:-1]:",
        PIECES,
    ),
    "linear: DoRA not rescaled": Mutation(
        "core/dora.py",
        "answer = gain * h if bias is None",
        "answer = h + 0 * gain if bias is None",
        WRAPPERS,
    ),
    "embedding: no embed_scale": Mutation("layers/embedding.py", "factors.scale * scale", "factors.scale", ANSWERS),
    "embedding: padding row trained": Mutation(
        "layers/embedding.py", "F.embedding(input, a.t(), self.padding_idx)", "F.embedding(input, a.t())", GRADIENTS
    ),
    "conv: no scale": Mutation("layers/conv.py", "*factors.moved()) * factors.scale", "*factors.moved())", ANSWERS),
    "conv: no padding mode": Mutation(
        "layers/conv.py",
        "self._conv_forward(x, kernel, None)",
        "POINTWISE[len(spatial)](x, kernel, None, self.stride, self.padding, self.dilation, self.groups)",
        ANSWERS,
    ),
    "convert: another model believed": Mutation(
        "adapters/convert/partner.py", "own not in (wanted, wanted[::-1])", "False", "test_convert_partner.py"
    ),
    "mlx: experts turned round": Mutation(
        "adapters/convert/mlx.py",
        "for number in range(count or most)",
        "for number in reversed(range(count or most))",
        "test_mlx_names.py",
    ),
    "mlx: an expert's parts exchanged": Mutation(
        "adapters/convert/mlx_names.py",
        '"w2": "down_proj", "w3": "up_proj"',
        '"w2": "up_proj", "w3": "down_proj"',
        "test_mlx_names.py",
    ),
    "disk: the recipe left behind": Mutation(
        "merge/disk/sidefiles.py", "elif recipes[0] is not None:", "elif False:", "test_merge_disk_recipe.py"
    ),
    "disk: the written scale left in": Mutation(
        "merge/disk/adapters.py",
        "factors = unfold(factors, self.path, files.companion)",
        "factors = factors",
        "test_merge_disk_bits.py",
    ),
    "finite: never asked": Mutation(
        "core/finite.py", "if not all_finite(tensor):", "if tensor is None:", "test_not_finite.py"
    ),
    "init: standard deviation one": Mutation("core/init/gaussian.py", "1 / site.rank", "1.0", INIT),
    "init: start factors not kept": Mutation(
        "injection/creation.py",
        "        start=(a.clone(), b.clone()) if starts[0].subtract",
        "        start=(a.clone(), b.clone()) if False",
        IDENTITY,
    ),
    "rows: the table's own are looked up": Mutation(
        "core/token_rows.py",
        "torch.where((self.in_order[place] == ids).unsqueeze(-1), rows, h)",
        "h",
        "test_token_rows.py",
    ),
    "rows: a head that is tied does not follow": Mutation(
        "injection/token_rows.py", "following = () if other else tuple(tied)", "following = ()", "test_token_rows.py"
    ),
    "rows: out of order": Mutation("core/token_rows.py", "self.slot[place]", "place", "test_token_rows.py"),
    "rows: the moved score is forgotten": Mutation(
        "core/token_rows.py",
        "moved = self.values - table[self.at].to(self.values.dtype)",
        "moved = self.values",
        "test_token_rows.py",
    ),
    "attention: the base alone answers": Mutation(
        "layers/attention.py", "if self.active_factors else", "if False else", "test_attention.py"
    ),
    "unload: flags not restored": Mutation(
        "injection/adapters.py", "parameter.requires_grad_(path in state.trained_before)", "pass", IDENTITY
    ),
    "parts: per head read as one after another": Mutation(
        "injection/fused.py",
        "return repeated(heads, q=hidden // heads, k=hidden // heads, v=hidden // heads)",
        "return stacked(q=hidden, k=hidden, v=hidden)",
        FUSED,
    ),
    "parts: CodeGen in the usual order": Mutation(
        "injection/fused.py", "q=quarter, v=quarter, k=quarter", "q=quarter, k=quarter, v=quarter", FUSED
    ),
    "checkpointing: no hook": Mutation(
        "injection/checkpointing.py", "output.requires_grad_(True)", "pass", CHECKPOINTING
    ),
    "files: scales not folded": Mutation(
        "checkpoint/one_scale.py", "return b if factor == 1 else (b.double() * factor).to(b.dtype)", "return b", SCALE
    ),
    "files: the smallest rank as r": Mutation(
        "checkpoint/describe.py", "r = max(ranks.values())", "r = min(ranks.values())", SCALE
    ),
    "files: own scales forgotten": Mutation(
        "checkpoint/restore.py", "companion.scales.get(path, factors.scale)", "factors.scale", SCALE
    ),
    "saving: Trainer's state left out": Mutation(
        "checkpoint/pretrained.py", "if CHECKPOINT.fullmatch(folder.name):", "if False:", PRETRAINED
    ),
    "loading: nothing undone": Mutation("injection/undo.py", "delete_adapter(model, name)", "pass", FAILURES),
    "loss: softmax without its onehot": Mutation(
        "train/chunked.py", "errors.new_full(at.shape, -1.0)", "errors.new_full(at.shape, 0.0)", CHUNKED
    ),
    "loss: the head's gradient of the last chunk alone": Mutation(
        "train/chunked.py", "summed.add_(new)", "summed.copy_(new)", CHUNKED
    ),
    "loss: a head that does not run alone": Mutation(
        "train/head.py", "apart <= AGREE[logits.dtype] * wanted.abs().max()", "apart >= 0", CHUNKED
    ),
    "preference: no rejected answer": Mutation("train/preference.py", "chosen - rejected", "chosen", PREFERENCE),
    "preference: the reference drops out": Mutation("train/preference.py", "model.eval()", "pass", PREFERENCE),
    "preference: prompts cut apart": Mutation(
        "data/preference.py", "len(side.ids) - over", "recipe.max_length", PREFERENCE
    ),
    "processes: each counts its own": Mutation(
        "train/processes.py", "distributed.all_reduce(tensor, how)", "pass", PROCESSES
    ),
    "resume: no random states": Mutation(
        CAPTURE,
        "    draw_on(next(loop.model.parameters()).device, where, facts.random[number])",
        "    pass",
        RESUME,
    ),
    "resume: Python's random numbers go on": Mutation(
        "train/state/randomness.py", "    random.setstate((WORDS, tuple(words), normal))", "    pass", RESUME
    ),
    "resume: Adam begins anew": Mutation(
        CAPTURE,
        '    _restore_optimiser(state, names, _those("optimiser", value.tensors), facts.optimiser)',
        "    pass",
        RESUME,
    ),
    "resume: no masters": Mutation(
        CAPTURE, '    _copy(_masters(state, names), _those("masters", value.tensors), "trained in float32")', "", RESUME
    ),
    "resume: the best is forgotten": Mutation(
        CAPTURE, "[torch.empty_like(parameter) for parameter in own.values()] if best else None", "None", RESUME
    ),
    "resume: the interval begins anew": Mutation(
        CAPTURE, "    state.interval = Interval(**facts.interval.model_dump())", "    pass", RESUME
    ),
    "resume: the rate is whole again": Mutation(
        CAPTURE, "facts.tokens, facts.halvings", "facts.tokens, 0", CHECKPOINTS
    ),
    "resume: the epoch begins anew": Mutation("data/batches.py", "lengths)[done:]", "lengths)", RESUME),
    "resume: lines of the log twice": Mutation(
        "train/reporting.py", "                os.truncate(self.path, length)", "                pass", RESUME
    ),
    "resume: buffers as they were loaded": Mutation(
        "train/state/forward.py",
        "_buffers[last] = buffer.to(own[name].device)",
        "_buffers[last] = own[name]",
        CHECKPOINTS,
    ),
}
