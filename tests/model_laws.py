"""The laws of the house, for every model family and option: causality, invariance, gradients, round trips.

A test class that derives from `ModelLaws` and names its `family` inherits a test of each law; those
that take `fields` run once for every variant of the family.
"""

from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from families import ATTRACTOR, Family, random_ids
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from hf_deq import ConvergenceWarning
from hf_deq.evaluation.activations import saved_activation_bytes
from hf_deq.evaluation.operation_counts import CountingMode


@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
class ModelLaws:
    family: Family

    # Causality

    @pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
    @pytest.mark.parametrize("budget", [1, 2, 4, 8, 30])
    @pytest.mark.parametrize("tolerance", [0.3, 1e-3, 1e-12])
    def test_strict_causality_at_any_budget_and_tolerance(self, solver, budget, tolerance):
        model = self.family.model(solver=solver)
        ids = random_ids(2, 12)
        changed = ids.clone()
        changed[:, 7] = (changed[:, 7] - 2) % 58 + 3
        dial = dict(solver_max_evaluations=budget, solver_tolerance=tolerance, use_cache=False)
        difference = (model(ids, **dial).logits - model(changed, **dial).logits).abs()
        assert difference[:, :7].max() <= 1e-12
        assert difference[:, 7].min() > 0

    def test_strict_causality_of_every_variant(self, fields):
        model = self.family.model(**fields)
        ids = random_ids(2, 10)
        changed = torch.cat([ids[:, :6], random_ids(2, 4)], 1)
        for budget in (2, 5):
            dial = dict(solver_max_evaluations=budget, use_cache=False)
            assert (model(ids, **dial).logits - model(changed, **dial).logits)[:, :6].abs().max() <= 1e-12

    # Batch and padding invariance

    def test_rows_do_not_depend_on_the_batch_or_on_padding(self, fields):
        model = self.family.model(**fields)
        rows = [random_ids(1, length) for length in (9, 5, 2)]
        for side in ("left", "right"):
            ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
            for i, row in enumerate(rows):
                place = slice(9 - row.shape[1], 9) if side == "left" else slice(0, row.shape[1])
                ids[i, place], mask[i, place] = row[0], 1
            # A small budget, so that agreement is exact by construction and not by convergence.
            for budget in (3, 200):
                batch = model(ids, attention_mask=mask, use_cache=False, solver_max_evaluations=budget)
                for i, row in enumerate(rows):
                    alone = model(row, use_cache=False, solver_max_evaluations=budget)
                    assert (batch.logits[i][mask[i].bool()] - alone.logits[0]).abs().max() < 1e-9
                    assert batch.residual[i] == pytest.approx(alone.residual[0].item(), rel=1e-3, abs=1e-11)

    def test_left_padding_with_position_ids_is_exact(self, fields):
        """What `generate` passes: positions that count tokens only."""
        model = self.family.model(**fields)
        row = random_ids(1, 5)
        ids, mask = pad(row, (4, 0)), torch.tensor([[0] * 4 + [1] * 5])
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        dial = dict(solver_max_evaluations=4)
        padded = model(ids, attention_mask=mask, position_ids=position_ids, **dial).logits[:, 4:]
        assert (padded - model(row, **dial).logits).abs().max() < 1e-12

    # Packed rows

    LENGTHS = (5, 1, 8, 3)

    def packed(self, **dial):
        """Two rows of texts, and the same texts alone; arguments that pack them."""
        ids = random_ids(2, sum(self.LENGTHS))
        positions = torch.cat([torch.arange(length) for length in self.LENGTHS])[None]
        numbers = torch.repeat_interleave(torch.arange(len(self.LENGTHS)), torch.tensor(self.LENGTHS))
        blocks = (numbers[:, None] == numbers) & torch.ones(len(numbers), len(numbers)).tril().bool()
        window = getattr(self.family.config(**dial), "sliding_window", None) or len(numbers)
        blocks &= torch.ones(len(numbers), len(numbers)).triu(1 - window).bool()
        alone = [text[None] for row in ids for text in row.split(self.LENGTHS)]
        additive = torch.zeros(2, 1, *blocks.shape, dtype=torch.float64).masked_fill_(
            ~blocks, torch.finfo(torch.float64).min
        )
        mask = dict(position_ids=positions.expand(2, -1))
        return ids, alone, (mask, mask | dict(attention_mask=blocks[None, None]), mask | dict(attention_mask=additive))

    def test_packed_texts_are_texts_alone(self, fields):
        """At any budget, by positions or by a block-diagonal mask; each is reported on its own."""
        model = self.family.model(**fields)
        ids, alone, ways = self.packed(**fields)
        for budget in (2, 5, 200):
            dial = dict(solver_max_evaluations=budget, solver_tolerance=1e-9)
            expected = [model(text, use_cache=False, **dial) for text in alone]
            for way in ways:
                output = model(ids, **way, **dial)
                pieces = [piece[None] for row in output.logits for piece in row.split(self.LENGTHS)]
                for piece, text in zip(pieces, expected, strict=True):
                    assert (piece - text.logits).abs().max() <= 1e-10
                assert output.num_evaluations.tolist() == [text.num_evaluations.item() for text in expected]
                assert output.converged.tolist() == [text.converged.item() for text in expected]
                assert output.cache is None and output.memory is None

    @pytest.mark.parametrize("gradient", ["implicit", "phantom", "unrolled", "reversible"])
    def test_packed_texts_are_trained_as_texts_alone(self, gradient):
        """At a tight tolerance and at a loose one, where the solves are cut short in both directions."""
        for tolerance in (1e-2, 1e-10):
            fields = dict(gradient=gradient, solver_max_evaluations=40, solver_tolerance=tolerance)
            model = self.family.model(**fields, backward_tolerance=tolerance).train()
            ids, alone, ways = self.packed()
            labels = ids.clone()
            labels[:, [0, 5, 6, 14]] = -100  # no text predicts the next one
            # The text of one token has nothing to predict.
            texts = [(text, dict(labels=text, num_items_in_batch=1)) for text in alone if text.shape[1] > 1]
            apart = self._parameter_gradients(model, texts)
            for way in ways:
                packed = self._parameter_gradients(model, [(ids, dict(labels=labels, num_items_in_batch=1, **way))])
                assert (packed - apart).abs().max() <= 1e-10 * apart.abs().max()

    def _parameter_gradients(self, model, batches) -> torch.Tensor:
        model.zero_grad()
        for ids, arguments in batches:
            model(ids, use_cache=False, **arguments).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    @pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e200])
    @pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
    def test_a_poisoned_text_harms_no_other(self, solver, poison):
        model = self.family.model(solver=solver)
        ids, _, ways = self.packed()
        embeds = model.get_input_embeddings()(ids).detach()
        poisoned = embeds.clone()
        poisoned[:, 7] = poison  # in the third text
        for way in ways:
            dial = dict(way, solver_max_evaluations=6, solver_tolerance=1e-3)
            before, after = model(inputs_embeds=embeds, **dial), model(inputs_embeds=poisoned, **dial)
            difference = (before.logits - after.logits).abs()
            assert difference[:, :7].max() <= 1e-12 and difference[:, 14:].max() <= 1e-12
            others = [0, 1, 3, 4, 5, 7]
            torch.testing.assert_close(before.residual[others], after.residual[others], rtol=1e-6, atol=0)

    @pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
    def test_what_is_no_number_reaches_no_earlier_position(self, fields, solver):
        model = self.family.model(**{**fields, "solver": solver})
        embeds = model.get_input_embeddings()(random_ids(4, 8)).detach()
        poisoned = embeds.clone()
        for row, poison in enumerate((float("nan"), float("inf"), -float("inf"))):
            poisoned[row, -1] = poison
        for budget in (2, 30):
            dial = dict(solver_max_evaluations=budget, use_cache=False)
            before, after = model(inputs_embeds=embeds, **dial), model(inputs_embeds=poisoned, **dial)
            assert torch.equal(before.logits[:, :-1], after.logits[:, :-1])
            assert torch.equal(before.logits[3], after.logits[3])
            assert after.residual[:3].eq(float("inf")).all() and not after.converged[:3].any()

    @pytest.mark.parametrize("gradient", ["phantom", "unrolled", "reversible"])
    def test_what_is_no_number_reaches_no_earlier_position_with_gradients(self, fields, gradient):
        """Steps with a graph have no solver that stops a position."""
        model = self.family.model(**fields, gradient=gradient, solver_max_evaluations=3)
        embeds = model.get_input_embeddings()(random_ids(2, 8)).detach()
        poisoned = embeds.clone()
        poisoned[0, 5] = float("inf")
        with torch.enable_grad():
            before, after = model(inputs_embeds=embeds), model(inputs_embeds=poisoned)
        assert torch.equal(before.logits[:, :5], after.logits[:, :5])
        assert torch.equal(before.logits[1], after.logits[1])

    def test_an_overflow_reaches_no_earlier_position(self, fields):
        """A huge input is a number, but what f makes of it is not."""
        model = self.family.model(**fields)
        embeds = model.get_input_embeddings()(random_ids(2, 8)).detach()
        huge = embeds.clone()
        huge[0, 5] = 1e160
        dial = dict(solver_max_evaluations=4, use_cache=False)
        before, after = model(inputs_embeds=embeds, **dial), model(inputs_embeds=huge, **dial)
        assert torch.equal(before.logits[:, :5], after.logits[:, :5])
        assert torch.equal(before.logits[1], after.logits[1])

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.slow
    def test_compiled_models_read_masks_and_positions_alike(self):
        model = self.family.model(solver_tolerance=1e-9)
        compiled = torch.compile(model, backend="eager")
        ids, _, ways = self.packed()
        left = torch.ones(2, 17, dtype=torch.long)
        left[0, :3] = 0
        longer = torch.cat([left, torch.zeros(2, 4, dtype=torch.long)], 1)
        for arguments in (ways[0], ways[1], dict(attention_mask=left), dict(attention_mask=longer)):
            with torch.no_grad():
                expected = model(ids, use_cache=False, solver_max_evaluations=30, **arguments)
                output = compiled(ids, use_cache=False, solver_max_evaluations=30, **arguments)
            assert output.num_evaluations.shape == expected.num_evaluations.shape
            assert (output.logits - expected.logits).abs().max() <= 1e-7

    def test_cu_seq_lens_pack_a_row(self):
        model = self.family.model()
        ids, _, (way, *_) = self.packed()
        lengths = torch.tensor([0, *self.LENGTHS]).cumsum(0).int()
        by_lengths = model(ids[:1], cu_seq_lens_q=lengths, use_cache=False).logits
        by_positions = model(ids[:1], position_ids=way["position_ids"][:1], use_cache=False).logits
        assert torch.equal(by_lengths, by_positions)

    def test_structure_that_cannot_be_honoured_is_refused(self):
        model = self.family.model()
        ids, _, (way, *_) = self.packed()
        cache = model(ids[:, :3]).cache
        causal = torch.ones(2, 1, 6, 6).tril().bool()
        holes, padded, short = causal.clone(), causal.clone(), torch.ones(2, 5)
        holes[:, :, 4, 1] = False
        padded[:, :, :, 2] = False
        for arguments, message in (
            (dict(way, cache=cache), "position_ids start again.*neither a cache nor a memory"),
            (dict(attention_mask=holes), "4D attention_mask must let every token attend to all tokens of its text"),
            (dict(attention_mask=causal.long()), "4D attention_mask must be boolean.*got torch.int64"),
            (dict(attention_mask=causal[:, :, :5]), r"4D attention_mask must be \(2, heads, 6, keys\)"),
            (dict(attention_mask=short), r"attention_mask must be \(batch, past \+ sequence\) = \(2, 6\)"),
            (dict(attention_mask=torch.ones(3, 6)), r"attention_mask must be.*got \(3, 6\)"),
            (dict(solver_tolerance=float("nan")), "solver_tolerance must be zero or positive, and finite; got nan"),
            (dict(position_ids=torch.arange(2)[None]), r"position_ids must be \(batch, sequence\) = \(2, 6\)"),
            (dict(cu_seq_lens_q=torch.tensor([0, 2])), "cu_seq_lens_q: it must end with the length of the row"),
            (dict(solver_max_evaluations=2.5), "solver_max_evaluations must be a whole number of at least 1, got 2.5"),
            (dict(unroll_steps=0), "unroll_steps must be a whole number of at least 1, got 0"),
            (dict(unroll_steps=3, solver_max_evaluations=9), "solver_max_evaluations=9 would have no effect"),
            (dict(cu_seq_lens_q=torch.tensor([0, 6]), attention_mask=torch.ones(2, 6)), "leave attention_mask out"),
        ):
            inputs = ids if "cache" in arguments else ids[:, :6]
            with pytest.raises(ValueError, match=message):
                model(inputs, **arguments)
        with pytest.raises(ValueError, match=r"input_ids must have 2 dimensions.*got \(11,\)"):
            model(torch.arange(11))

    def test_masks_are_read_as_llama_reads_them(self):
        """Columns after the last token do not count; a batch of one 4D mask is for all rows."""
        model, ids = self.family.model(), random_ids(2, 6)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        longer = torch.cat([mask, torch.zeros(2, 3, dtype=torch.long)], 1)
        expected = model(ids, attention_mask=mask, use_cache=False)
        assert torch.equal(model(ids, attention_mask=longer, use_cache=False).logits, expected.logits)
        causal = torch.ones(1, 1, 6, 6).tril().bool()
        plain = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, attention_mask=causal, use_cache=False).logits, plain, rtol=0, atol=1e-12)

    # Gradients

    @pytest.mark.parametrize("gradient", ["implicit", "phantom", "reversible"])
    def test_a_wrapper_may_compute_the_container_again(self, gradient):
        """Without saying anything of a cache: in backward, such a cache would hold the text already."""
        ids, gradients = random_ids(2, 6), []
        for wraps in (False, True):
            model = self.family.model(gradient=gradient).train()
            if wraps:
                model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
            output = model(ids, labels=ids)
            assert output.cache is None
            gradients.append(torch.autograd.grad(output.loss, [*model.parameters()]))
        for ours, exact in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-10)

    def test_gradients_are_finite_behind_rows_that_see_nothing(self):
        """A padded row of a prepared additive mask may be -inf throughout."""
        ids, tokens = random_ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
        seen = torch.ones(6, 6).tril().bool() & tokens[:, None, None] & tokens[:, None, :, None]
        mask, gradients = torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(~seen, -torch.inf), []
        for given in (mask, tokens.long()):
            model = self.family.model(attn_implementation="eager")
            loss = model(ids, attention_mask=given, labels=ids.where(tokens, -100), use_cache=False).loss
            gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
        for ours, exact in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-8)

    def test_implicit_gradient_equals_120_unrolled_steps(self, fields):
        """For every parameter and the input, at the start of a text and where a memory goes in."""
        ids, before = random_ids(2, 6), random_ids(2, 5)
        for previous in (None, before) if self.family.remembers else (None,):
            implicit = self._gradients(ids, previous, fields)
            unrolled = self._gradients(ids, previous, fields, gradient="unrolled", solver_max_evaluations=120)
            assert implicit.keys() == unrolled.keys()
            assert len(implicit) == 1 + sum(1 for _ in self.family.model(**fields).parameters())
            for name, exact in unrolled.items():
                error = torch.linalg.vector_norm(implicit[name] - exact)
                assert error <= 1e-6 * torch.linalg.vector_norm(exact) + 1e-12, name

    def _gradients(self, ids, previous, fields, **how):
        tolerances = dict(solver_tolerance=1e-12, backward_tolerance=1e-12)
        model = self.family.model(**(self.family.remembering or {}), **fields, **tolerances, **how)
        memory = None if previous is None else model(previous, use_cache=False).memory
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds, labels=ids, use_cache=False, memory=memory).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name, _ in model.named_parameters():
            if name.startswith("model.embed_tokens."):  # what is not tied: the input was given embedded
                gradients.setdefault(name, torch.zeros(()))
        return gradients | {"embeds": embeds.grad}

    @pytest.mark.parametrize("gradient", ["implicit", "phantom", "unrolled", "reversible"])
    def test_a_few_steps_of_training_lower_the_loss(self, gradient):
        model = self.family.model(
            gradient=gradient, solver_max_evaluations=12, solver_tolerance=1e-3, backward_tolerance=1e-2
        ).train()
        ids = random_ids(4, 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            losses.append(model(ids, labels=ids, use_cache=False).loss)
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.5 * losses[0]

    # Saving and loading

    def test_round_trip_is_bitwise(self, fields, tmp_path):
        model = self.family.model(**fields)
        model.save_pretrained(tmp_path)
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]
        how = dict(dtype=torch.float64, attn_implementation=fields.get("attn_implementation"))
        # Copies, since a file's tensors may lie at any address, and sums are rounded according to their alignment.
        loaded = deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path, **how))
        ids = random_ids(2, 8)
        assert type(loaded) is self.family.model_class
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        base = deepcopy(AutoModel.from_pretrained(tmp_path, **how))
        assert type(base) is self.family.base_class
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_round_trip_in_other_dtypes(self, tied, dtype, tmp_path):
        model = self.family.model(tie_word_embeddings=tied).to(dtype)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", device_map="cpu")
        ids = random_ids(2, 8)
        assert loaded.dtype == dtype
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tied

    def test_missing_weights_are_initialised(self, fields):
        """Loading builds on the meta device: everything that is not in the file must come from _init_weights."""
        loaded = self.family.model_class.from_pretrained(None, config=self.family.config(**fields), state_dict={})
        for name, parameter in loaded.named_parameters():
            assert parameter.isfinite().all() and parameter.abs().max() < 50, name
        assert loaded(random_ids(1, 4)).logits.isfinite().all()

    def test_weights_that_are_fetched_for_each_module_call(self):
        """accelerate's offloading gives a module its weights while its own forward runs, and only then."""
        ids = random_ids(1, 5)
        for fields in self.family.variants.values():
            model = self.family.model(**fields)
            expected = model(ids, labels=ids)
            output = cpu_offload(model, execution_device="cpu")(ids, labels=ids)
            assert torch.equal(output.logits, expected.logits) and output.loss == expected.loss

    # Convergence

    def test_bfloat16_converges_to_what_rounding_allows(self):
        model = self.family.model(solver_tolerance=1e-3, solver_max_evaluations=30).to(torch.bfloat16)
        output = model(random_ids(3, 20))
        assert output.logits.dtype == torch.bfloat16 and output.converged.all()

    def test_a_new_default_model_converges_quickly(self):
        torch.manual_seed(0)
        model = self.family.model_class(self.family.config(**self.family.wide)).eval()
        output = model(torch.randint(3, 500, (4, 64)), solver_tolerance=1e-3)
        assert output.converged.all() and output.num_evaluations.max() <= 15

    def test_sequence_scope_agrees_at_convergence_and_refuses_a_cache(self):
        ids = random_ids(2, 8)
        model = self.family.model(solver_scope="sequence")
        torch.testing.assert_close(model(ids).logits, self.family.model()(ids).logits, rtol=0, atol=1e-8)
        assert model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (2, 10)
        with pytest.raises(ValueError, match='solver_scope="sequence".*use_cache=False'):
            model(ids, use_cache=True)

    def test_unroll_steps_apply_f_so_many_times(self):
        ids = random_ids(1, 5)
        output = self.family.model()(ids, unroll_steps=3, use_cache=False)
        with torch.no_grad():
            picard = self.family.model(solver="picard")(ids, solver_max_evaluations=3, solver_tolerance=0.0)
        assert output.num_evaluations.tolist() == [3]
        torch.testing.assert_close(output.logits, picard.logits, rtol=0, atol=1e-12)

    def test_activation_checkpointing_of_unrolled_applications(self, fields):
        """As Transformers switches it on: the same gradients, and of all applications the states are kept alone."""
        (gradients, kept), (recomputed, kept_of_them) = self._trained_with_and_without_checkpointing(fields, 6)
        torch.testing.assert_close(recomputed, gradients, rtol=0, atol=1e-12)
        assert kept_of_them < 0.7 * kept

    def test_activation_checkpointing_changes_no_implicit_gradient(self):
        """Only layers outside of f have activations to spare."""
        (gradients, kept), (same, also_kept) = self._trained_with_and_without_checkpointing({}, None)
        assert torch.equal(same, gradients)
        assert also_kept < kept if self.family is ATTRACTOR else also_kept == kept

    def _trained_with_and_without_checkpointing(self, fields, unroll_steps) -> list[tuple[torch.Tensor, int]]:
        """All gradients of a step, and the bytes that it keeps for backward."""
        ids, steps = random_ids(2, 6), []
        for checkpointing in (False, True):
            model = self.family.model(**fields).train()
            if checkpointing:
                model.activation_checkpointing_enable()
            model(ids, labels=ids, use_cache=False, unroll_steps=unroll_steps).loss.backward()
            gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            steps.append((gradients, saved_activation_bytes(model, ids, unroll_steps=unroll_steps)))
        return steps

    def test_unrolled_models_refuse_a_cache_and_generate_without(self):
        ids = random_ids(1, 4)
        model = self.family.model(gradient="unrolled", solver_max_evaluations=3)
        with pytest.raises(ValueError, match="Unrolled steps.*use_cache=False"):
            model(ids, use_cache=True)
        cache = self.family.model()(ids).cache
        assert self.family.model()(ids, unroll_steps=2).cache is None
        with pytest.raises(ValueError, match="Unrolled steps.*use_cache=False"):
            self.family.model()(ids, cache=cache, unroll_steps=2)
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert tokens[0, -1] == model(tokens[:, :-1]).logits[0, -1].argmax()

    @pytest.mark.parametrize("override", [{"gradient": "unrolled"}, {"solver_scope": "sequence"}])
    def test_models_loaded_with_another_gradient_generate_without_a_cache(self, tmp_path, override):
        self.family.model().save_pretrained(tmp_path)
        model, ids = AutoModelForCausalLM.from_pretrained(tmp_path, **override), random_ids(1, 4)
        greedy = dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
        expected = model.generate(ids, **greedy, use_cache=False)
        assert torch.equal(model.generate(ids, **greedy), expected)
        assert torch.equal(model.generate(ids, model.generation_config, **greedy), expected)
        static = dict(cache_implementation="static")
        assert torch.equal(model.generate(ids, **greedy, **static, use_cache=False), expected)
        saved = GenerationConfig.from_pretrained(tmp_path)
        assert saved.use_cache and torch.equal(model.generate(ids, saved, **greedy), expected)
        for asked in (dict(use_cache=True), static, dict(generation_config=GenerationConfig(**static))):
            with pytest.raises(ValueError, match="use_cache=False"):
                model.generate(ids, **greedy, **asked)

    def test_a_missed_tolerance_is_reported(self):
        with pytest.warns(ConvergenceWarning, match="Raise max_evaluations"):
            output = self.family.model()(random_ids(2, 5), solver_max_evaluations=2)
        assert not output.converged.any() and (output.residual > 1e-10).all()

    # The interface

    def test_the_attention_function_can_be_changed_later(self):
        model, ids = self.family.model(), random_ids(2, 6)
        expected = model(ids).logits
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-9)

    def test_loss_is_the_mean_over_next_tokens(self, fields):
        model = self.family.model(**fields)
        ids = random_ids(2, 9)
        labels = ids.clone()
        labels[0, :4] = -100
        output = model(ids, labels=labels)
        expected = cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        torch.testing.assert_close(output.loss.float(), expected)
        halves = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=13).loss for i in range(2)]
        torch.testing.assert_close(sum(halves).float(), expected)
        shifted = model(ids, labels=labels, shift_labels=pad(labels[:, 1:], (0, 1), value=-100)).loss
        torch.testing.assert_close(shifted.float(), expected)
        torch.testing.assert_close(model.train()(ids, labels=labels).loss.float(), expected)

    def test_the_logits_are_computed_once(self):
        """No second tensor of their size: in a small model, it costs a sixth of a training step."""
        model, ids = self.family.model(vocab_size=997), random_ids(2, 5)

        class Logits(CountingMode):
            made = set()

            def note(self, operation, tensors):
                sized = (tensor for tensor in tensors if tensor.numel() == ids.numel() * 997)
                self.made.update(tensor.untyped_storage().data_ptr() for tensor in sized)

        with Logits() as logits:
            output = model(ids)
        assert logits.made == {output.logits.untyped_storage().data_ptr()}

    def test_logits_to_keep_embeds_and_hidden_states(self, fields):
        model = self.family.model(**fields)
        ids = random_ids(2, 9)
        full = model(ids, output_hidden_states=True)
        kept = model(ids, logits_to_keep=2).logits
        torch.testing.assert_close(kept, full.logits[:, -2:], rtol=0, atol=1e-12)
        kept = model(ids, logits_to_keep=torch.tensor([0, 5])).logits
        torch.testing.assert_close(kept, full.logits[:, [0, 5]], rtol=0, atol=1e-12)
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, full.logits)
        injected, *_, equilibrium_state = full.hidden_states
        assert injected.shape == embeds.shape and equilibrium_state.shape == (2, 9, model.config.hidden_size)
        assert torch.equal(model._logits(equilibrium_state), full.logits)

    def test_return_dict_false_and_model_outputs(self):
        model = self.family.model()
        ids = random_ids(1, 4)
        output = model(ids, labels=ids)
        assert model(ids, labels=ids, return_dict=False)[0] == output.loss
        assert {"residual", "num_evaluations", "converged"} <= output.keys()

    def test_misspelt_dials_are_refused(self):
        with pytest.raises(TypeError, match="no argument 'solver_tolerence'; the dial is solver_tolerance"):
            self.family.model()(random_ids(1, 3), solver_tolerence=1e-2)

    @pytest.mark.parametrize(
        "inputs, message",
        [
            (dict(input_ids=torch.tensor([[3, 61]])), r"\[0, vocab_size=61\), got 3 to 61"),
            (dict(input_ids=torch.tensor([[-1, 5]])), "got -1 to 5"),
            (dict(input_ids=torch.empty(1, 0, dtype=torch.long)), "input is empty"),
            (dict(), "exactly one of input_ids and inputs_embeds"),
            (dict(input_ids=torch.tensor([[3]]), inputs_embeds=torch.zeros(1, 1, 16)), "exactly one of"),
            (dict(inputs_embeds=torch.zeros(1, 2, 5)), r"must be \(batch, sequence, 16\), got \(1, 2, 5\)"),
            (dict(input_ids=torch.tensor([[3]]), solver_max_evaluations=0), "solver_max_evaluations must be a whole"),
            (dict(input_ids=torch.tensor([[3]]), solver_tolerance=-1.0), "tolerance must be zero or positive"),
        ],
    )
    def test_bad_inputs_are_refused(self, inputs, message):
        with pytest.raises(ValueError, match=message):
            self.family.model()(**inputs)

    # Regularization

    def test_dropout_masks_are_drawn_once_per_solve(self):
        ids = random_ids(2, 8)
        for dropout in self.family.dropouts:
            model = self.family.model(**{dropout: 0.3}).train()
            torch.manual_seed(1)
            first = model(ids, use_cache=False)
            assert first.converged.all(), dropout  # impossible if f changed between its evaluations
            torch.manual_seed(1)
            assert torch.equal(model(ids, use_cache=False).logits, first.logits), dropout
            assert not torch.allclose(model(ids, use_cache=False).logits, first.logits), dropout
            model.eval()
            assert torch.equal(model(ids).logits, model(ids).logits), dropout

    def test_jacobian_loss_enters_the_loss(self):
        ids = random_ids(4, 8)
        assert self.family.model().train()(ids, labels=ids).jacobian_loss is None
        model = self.family.model(jacobian_loss_weight=2.0)
        assert model(ids, labels=ids).jacobian_loss is None  # evaluation mode
        plain = model(ids, labels=ids).loss
        model.train()
        output = model(ids, labels=ids)
        torch.testing.assert_close(output.loss, plain + 2.0 * output.jacobian_loss)

    def test_jacobian_loss_does_not_depend_on_padding(self, monkeypatch):
        def noise(shape, dtype, **options):
            """The same at all positions, however many there are, but not for all features: a norm would remove it."""
            return torch.arange(shape[-1], dtype=dtype).cos().expand(shape)

        monkeypatch.setattr(torch, "randn", noise)
        model = self.family.model(jacobian_loss_weight=1.0).train()
        ids = random_ids(2, 8)
        alone = model(ids, labels=ids).jacobian_loss
        assert alone > 1e-3
        for left, right in ((0, 5), (5, 0)):
            padded, mask = pad(ids, (left, right)), pad(torch.ones_like(ids), (left, right))
            torch.testing.assert_close(model(padded, attention_mask=mask, labels=padded).jacobian_loss, alone)

    def test_jacobian_loss_is_shared_among_micro_batches(self):
        model = self.family.model(jacobian_loss_weight=2.0, solver_tolerance=1e-4).train()
        ids, items = random_ids(4, 8), 50
        for labels, counted in ((dict(labels=ids), 4 * 7), (dict(labels=ids, shift_labels=ids), 4 * 8)):
            output = model(ids, **labels, num_items_in_batch=items)
            model.config.jacobian_loss_weight = 0.0
            plain = model(ids, **labels, num_items_in_batch=items)
            model.config.jacobian_loss_weight = 2.0
            expected = plain.loss + 2.0 * counted / items * output.jacobian_loss
            torch.testing.assert_close(output.loss, expected.to(output.loss.dtype), rtol=1e-5, atol=1e-6)

    def test_jacobian_loss_shrinks_the_jacobian(self):
        def jacobian_after_training(weight):
            loose = dict(solver_max_evaluations=30, solver_tolerance=1e-3, backward_tolerance=1e-2)
            model = self.family.model(jacobian_loss_weight=weight, **loose).train()
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            for _ in range(30):
                optimizer.zero_grad()
                model(ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
            model.config.jacobian_loss_weight = 1.0
            return torch.stack([model(ids, labels=ids).jacobian_loss for _ in range(10)]).mean()

        ids = random_ids(4, 8)
        assert jacobian_after_training(100.0) < 0.6 * jacobian_after_training(0.0)

    def test_jacobian_loss_frequency_is_a_share_of_the_steps(self):
        model = self.family.model(jacobian_loss_weight=1.0, jacobian_loss_frequency=0.3, solver_tolerance=1e-2).train()
        ids = random_ids(1, 3)
        applied = sum(model(ids, labels=ids, use_cache=False).jacobian_loss is not None for _ in range(100))
        assert 15 <= applied <= 45
