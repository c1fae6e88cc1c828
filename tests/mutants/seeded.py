"""Seeded bugs, each with the test that must catch it. `make mutants` tries them all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """In `file`, `old` (which stands there once) becomes `new`; then `test`, which passed, fails."""

    name: str
    file: str
    old: str
    new: str
    test: str
    interpreted: bool = False  # the test runs kernels in Triton's interpreter


PACKING, PLAN, FOLD = "tests/test_packing.py", "tests/test_plan.py", "tests/weights/test_fold_pack.py"
ENCODER, CALLS, DEFINE = "tests/test_encoder.py", "tests/test_calls.py", "tests/test_define.py"
CHECKPOINT, KERNELS = "tests/weights/test_checkpoint.py", "tests/kernels/interpreted.py"
VLLM = "tests/adapters/test_vllm.py"
EMBED, ENCODE, SOURCES = "tests/test_embed.py", "tests/test_encode.py", "tests/test_sources.py"

MUTANTS = (
    # --- the host: packing, plan, workspace, buckets ---
    Mutant("one row too many", "fused_vit/packing.py", "return [row, merged,", "return [row + 1, merged,",
           f"{PACKING}::test_the_table_adds_up"),
    Mutant("packs overflow segments", "fused_vit/packing.py", "(largest.segments - segments) // parts, left)", "left)",
           f"{PACKING}::test_packs_hold_every_frame_once_in_order_and_fit"),
    Mutant("a segment off by one tile", "fused_vit/packing.py", "-(-ranked.segment_rows // tile)",
           "ranked.segment_rows // tile", f"{PACKING}::test_the_table_adds_up"),
    Mutant("the shortest segments first", "fused_vit/packing.py", "-pack[i].segment_rows)", "pack[i].segment_rows)",
           f"{PACKING}::test_the_table_adds_up"),
    Mutant("windows counted once a clip", "fused_vit/packing.py", "window += item.t * item.windows",
           "window += item.windows", f"{PACKING}::test_the_table_adds_up"),
    Mutant("a buffer dies while it is read", "fused_vit/workspace.py", "max(i, spans.get(name, (i, i))[1])", "i - 1",
           f"{PLAN}::test_no_step_overwrites_what_a_later_one_reads"),
    Mutant("a missing event", "fused_vit/turns.py", "stream.wait_event(self._done)", "pass",
           "tests/test_turns.py::test_a_stream_waits_for_the_last_turn_of_another"),
    Mutant("a step aside is not waited for", "fused_vit/executor.py", "running & step.touched:", "False:",
           f"{PLAN}::test_steps_aside_share_no_memory_with_what_runs_beside_them"),
    Mutant("outputs overwritten", "fused_vit/workspace.py", "(spans[name][0], len(plan.steps)) for", "spans[name] for",
           f"{PLAN}::test_no_step_overwrites_what_a_later_one_reads"),
    Mutant("a bucket that is too small", "fused_vit/buckets.py", "tokens <= self.tokens and", "",
           f"{ENCODER}::test_ladders_and_choices"),
    Mutant("half the FLOPs", "fused_vit/plan.py", "Cost(2.0 * m * n * k,", "Cost(m * n * k,",
           f"{PLAN}::test_costs_are_the_towers_arithmetic"),
    Mutant("deepstack features in the order of the list", "fused_vit/plan.py", "spec.deepstack.index(i)",
           "len(deepstack)",
           f"{DEFINE}::test_the_definition_is_transformers_tower"),
    Mutant("frames see each other", "fused_vit/packing.py", "t if clip else 1", "t",
           f"{DEFINE}::test_video_frames_are_images"),
    # --- vLLM ---
    Mutant("tensors of a loader's buffer kept", "fused_vit/adapters/vllm.py", 'tensor.to("cpu", copy=True)',
           'tensor.to("cpu")', f"{VLLM}::test_loaders_may_reuse_their_buffers"),
    Mutant("an update that graphs do not see", "fused_vit/adapters/vllm.py", "self._vit.weights[name].copy_(tensor)",
           "self._vit.weights[name] = tensor", f"{VLLM}::test_weights_come_in_parts_and_are_updated_in_place"),
    Mutant("deepstack features first", "fused_vit/adapters/vllm.py", "[out.pooler_output, *out.deepstack_features]",
           "[*out.deepstack_features, out.pooler_output]",
           f"{VLLM}::test_the_same_rows_as_transformers_in_vllms_layout"),
    Mutant("packed in half precision", "fused_vit/adapters/vllm.py", "set_default_dtype(torch.float32)",
           "set_default_dtype(before)", f"{VLLM}::test_loading_is_not_changed_by_vllms_defaults"),
    Mutant("subclasses of a tower replaced", "fused_vit/vllm.py", "cls is tower and", "issubclass(cls, tower) and",
           f"{VLLM}::test_subclasses_are_other_towers"),
    # --- calls ---
    Mutant("odd sides pass", "fused_vit/packing.py", "if h % m or w % m:", "if h % m:",
           f"{CALLS}::test_a_bad_call_is_one_clear_value_error_and_costs_nothing"),
    Mutant("too few pixels pass", "fused_vit/packing.py", "if total != rows:", "if total < rows:",
           f"{CALLS}::test_a_bad_call_is_one_clear_value_error_and_costs_nothing"),
    Mutant("a closed encoder runs", "fused_vit/encoder.py", "if not self.weights:", "if self.weights is None:",
           f"{ENCODER}::test_stats_count_and_a_closed_encoder_says_so"),
    Mutant("a fork closes its parent's encoder", "fused_vit/encoder.py", "if self._turns.forked():  # they",
           "if False:  # they", f"{ENCODER}::test_a_forked_process_is_told_to_load_its_own"),
    Mutant("a tile's margin is not counted", "fused_vit/images.py", "(tags.get(322, 1), tags.get(323, 1))", "(1, 1)",
           "tests/test_image_memory.py::test_what_is_crafted_to_take_more_does_not"),
    Mutant("one norm over four patches", "fused_vit/plan.py", "1 if whole else spec.patches", "1",
           f"{DEFINE}::test_the_definition_is_transformers_tower"),
    # --- archives ---
    Mutant("a share twice", "fused_vit/sources.py", "records[len(records) * part // parts :",
           "records[max(0, len(records) * part // parts - 1) :",
           f"{SOURCES}::test_shares_partition_whatever_their_number"),
    Mutant("a member a byte off", "fused_vit/sources.py", "tar.seek(offset)", "tar.seek(offset + 1)",
           f"{SOURCES}::test_a_webdataset_tar_is_read_member_by_member"),
    Mutant("rows only forward", "fused_vit/sources.py", "if row < self.first:", "if False:",
           f"{SOURCES}::test_parquet_rows_are_read_alone_and_in_any_order"),
    Mutant("what is done is done again", "fused_vit/archive.py", "if size is None:", "if True:",
           f"{EMBED}::test_shards_partition_the_work_exactly"),
    Mutant("a manifest in its place at once", "fused_vit/shards.py", "os.link(unfinished, manifest)",
           "manifest.touch() or os.link(unfinished, manifest)",
           f"{EMBED}::test_killed_anywhere_a_second_run_completes_and_a_third_does_nothing"),
    Mutant("a shard in its place at once", "fused_vit/shards.py", 'unfinished = self.path / f"_{name}.tmp"',
           "unfinished = self.path / name",
           f"{EMBED}::test_killed_anywhere_a_second_run_completes_and_a_third_does_nothing"),
    Mutant("a changed file passes", "fused_vit/archive.py", "elif size != record.size:", "elif False:",
           f"{EMBED}::test_new_files_are_added_and_changed_ones_are_refused"),
    Mutant("encoders mix", "fused_vit/shards.py", 'if "encoder" in differs:', "if False:",
           f"{EMBED}::test_a_folder_of_another_encoder_or_of_other_options_is_refused"),
    Mutant("two runs of one share", "fused_vit/shards.py", "fcntl.flock(lock,", "(lambda *_: None)(lock,",
           f"{EMBED}::test_two_runs_of_one_share_are_refused"),
    Mutant("an image takes its batch along", "fused_vit/embedding.py", "if len(members) == 1:", "if members:",
           f"{EMBED}::test_an_image_that_cannot_be_encoded_costs_its_batch_nothing"),
    Mutant("workers outlive a killed run", "fused_vit/preparing.py", "    os._exit(1)", "    pass",
           f"{EMBED}::test_a_killed_run_leaves_no_process_and_no_work_undone"),
    Mutant("what was done is lost in an error", "fused_vit/archive.py", "        writer.close()\n        embedder",
           "        embedder", f"{EMBED}::test_what_was_done_before_an_error_is_kept"),
    Mutant("torchrun unseen", "fused_vit/archive.py", "if text is None and rank and world:", "if False:",
           f"{EMBED}::test_torchrun_needs_no_option"),
    Mutant("results out of order", "fused_vit/streams.py", "results[one.number] = one.embedding",
           "results[results.index(None)] = one.embedding",
           f"{ENCODE}::test_many_images_of_any_form_come_back_in_order"),
    Mutant("batches too full", "fused_vit/embedding.py", "if tokens + one.tokens <=", "if tokens <=",
           f"{ENCODE}::test_batches_are_filled_largest_first_and_never_over"),
    Mutant("a normalisation unproven", "fused_vit/stills.py",
           "if _only_normalises(spec, prepare, numbers) else", "if True else",
           f"{ENCODE}::test_a_processor_that_does_more_than_normalise_is_taken_as_it_is"),
    Mutant("a lone image waits", "fused_vit/streams.py", "            yield None\n            found = ready.get()",
           "            found = ready.get()", f"{ENCODE}::test_a_lone_image_does_not_wait_for_others"),
    Mutant("the mean of black", "weights/fold.py", "(128 - 255 * mean[:, None])", "(0 - 255 * mean[:, None])",
           "tests/test_stills.py::test_bytes_give_what_normalised_pixels_give"),
    # --- weights ---
    Mutant("the norm's bias skipped", "weights/fold.py", "shift + weight @ beta", "shift",
           f"{FOLD}::test_layer_norm_folds_into_the_next_matmul"),
    Mutant("column sums of the unrounded weight", "weights/fold.py", "rounded.double().sum(1)",
           "rounded.double().sum(1) * 1.001", f"{FOLD}::test_the_column_sum_must_be_of_the_rounded_weight"),
    Mutant("a softmax of base 2", "weights/fold.py", "* math.log2(math.e)", "",
           f"{FOLD}::test_softmax_scale_turns_exp2_into_softmax"),
    Mutant("pairs that are no pairs", "weights/fold.py", '"(head pair j) ... -> (head j pair) ..."',
           '"(head pair j) ... -> (head pair j) ..."', f"{FOLD}::test_rotation_pairs_become_neighbours"),
    Mutant("rows turn as columns do", "weights/fold.py", "[torch.cat([frequency, none]), torch.cat([none, frequency])]",
           "[torch.cat([none, frequency]), torch.cat([frequency, none])]",
           f"{DEFINE}::test_the_definition_is_transformers_tower"),
    Mutant("links may lead out", "weights/checkpoint.py", "if not path.resolve().is_relative_to(root):", "if False:",
           f"{CHECKPOINT}::test_links_out_of_the_folder_are_refused"),
    Mutant("an index may climb", "weights/checkpoint.py", r'r"\w[\w.-]*\.safetensors"', r'r".*\.safetensors"',
           f"{CHECKPOINT}::test_shard_names_that_are_no_plain_files"),
    Mutant("shapes unchecked", "weights/checkpoint.py", "if shape != tuple(expected[key])", "if not shape",
           f"{CHECKPOINT}::test_all_misfits_in_one_error_before_any_data"),
    # --- kernels ---
    Mutant("no mask on keys", "kernels/attention.py", "scores = tl.where(mask_n[None, :], scores, float(\"-inf\"))",
           "scores = scores", f"{KERNELS}::test_attention", interpreted=True),
    Mutant("a neighbour's values", "kernels/attention.py",
           "v = tl.load(v_ptr + at[:, None] + offs_a[None, :], mask=mask_n",
           "v = tl.load(v_ptr + at[:, None] + offs_a[None, :], mask=(offs_n < (1 << 30))",
           f"{KERNELS}::test_a_nan_segment_leaves_its_neighbours_alone", interpreted=True),
    Mutant("sums not decayed", "kernels/attention.py", "total = total * decay + tl.sum(p, 1)",
           "total = total + tl.sum(p, 1)",
           f"{KERNELS}::test_attention", interpreted=True),
    Mutant("the patch's bias skipped", "kernels/patch_embed.py", "    x += tl.load(bias_ptr + column)[None, :]\n", "",
           f"{KERNELS}::test_patch_embed", interpreted=True),
    Mutant("a class token has pixels", "kernels/patch_embed.py", "tl.where(pixel[:, None] < 0, 0.0, x)", "x",
           f"{KERNELS}::test_patch_embed", interpreted=True),
    Mutant("a residual dropped", "kernels/residual.py",
           "[None, :] + tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)",
           "[None, :]", f"{KERNELS}::test_residual_in_place", interpreted=True),
    Mutant("a row past the count", "kernels/device.py", "mask = mask_m[:, None] & (parts < PARTS)[None, :]",
           "mask = (parts < PARTS)[None, :]", f"{KERNELS}::test_residual_in_place", interpreted=True),
    Mutant("turned the other way", "kernels/qkv.py", "tl.fma(odd, cos, even * sin)", "tl.fma(odd, cos, -(even * sin))",
           f"{KERNELS}::test_qkv", interpreted=True),
    Mutant("quarter turns swapped", "kernels/device.py", "odd = n % 2 != 0", "odd = n % 2 == 0",
           f"{KERNELS}::test_qkv", interpreted=True),
    Mutant("a clip's frames summed", "kernels/pool.py", "(total / frames)", "total",
           f"{KERNELS}::test_pool", interpreted=True),
    Mutant("a norm that is not centred", "kernels/norm.py", "y - (tl.sum(y, 1) / N)[:, None]", "y",
           f"{KERNELS}::test_norm", interpreted=True),
    Mutant("windows in rows", "kernels/unfold.py", "within -= column * high * SPAN", "within -= column * wide * SPAN",
           f"{KERNELS}::test_unfold", interpreted=True),
)  # fmt: skip
