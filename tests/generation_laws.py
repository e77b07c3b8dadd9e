"""Generation, for every model family and option: every way of decoding gives what the full forward pass gives."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import Family, random_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)

from hf_deq.generation_deq import _reports

GREEDY = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)
# For the laws that run for every variant. They compare tokens, which are the same at every tight tolerance.
SHORT = GREEDY | {"max_new_tokens": 7}
TIGHT = {"solver_tolerance": 1e-7}
REPORTED = GREEDY | {"return_dict_in_generate": True}


@torch.no_grad()
def greedy_without_cache(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def recorded_solves(model) -> list:
    """The outputs of the base model, from now on."""
    solves = []
    model.model.register_forward_hook(lambda module, args, output: solves.append(output))
    return solves


class Interrupting:
    """A streamer that does something else whenever tokens come."""

    def __init__(self, action):
        self.action = action

    def put(self, tokens):
        self.action()

    def end(self):
        pass


class GenerationLaws:
    """Derive from it and name the `family`."""

    family: Family

    @pytest.mark.parametrize("pieces", [[1] * 10, [5] + [1] * 5, [4, 3, 3]])
    @torch.no_grad()
    def test_cached_logits_equal_uncached_ones(self, fields, pieces):
        model = self.family.model(**fields)
        ids = random_ids(2, 10)
        full = model(ids, use_cache=False)
        cache, logits = None, []
        for piece in ids.split(pieces, 1):
            output = model(piece, cache=cache, use_cache=True)
            cache = output.cache
            logits.append(output.logits)
        assert full.converged.all()
        assert (torch.cat(logits, 1) - full.logits).abs().max() <= 1e-8

    @torch.no_grad()
    def test_the_cache_by_its_former_name(self):
        """Transformers called it past_key_values; outputs still have it under that name, through the library."""
        model, ids = self.family.model(), random_ids(1, 6)
        with pytest.warns(FutureWarning, match="Use `cache` instead"):
            start = model(ids[:, :5], past_key_values=DynamicCache(config=model.config), use_cache=True)
        rest = model(ids[:, 5:], cache=start.past_key_values).logits
        assert (rest - model(ids).logits[:, 5:]).abs().max() <= 1e-8

    @torch.no_grad()
    def test_cached_logits_at_the_default_tolerance(self):
        """In float32 at tolerance 1e-3: apart by a few times the tolerance, relative to the size of the logits."""
        model = self.family.model(solver_tolerance=1e-3).float()
        ids = random_ids(4, 24)
        full = model(ids, use_cache=False).logits
        cache, logits = DynamicCache(config=model.config), []
        for piece in ids.split([8] + [1] * 16, 1):
            logits.append(model(piece, cache=cache, use_cache=True).logits)
        assert (torch.cat(logits, 1) - full).norm() <= 5e-3 * full.norm()

    @torch.no_grad()
    def test_an_unconverged_solve_caches_the_state_it_returns(self):
        model = self.family.model(solver_max_evaluations=3)
        ids = random_ids(1, 6)
        with pytest.warns(UserWarning, match="Raise max_evaluations"):
            cache = model(ids, use_cache=True).cache
        exact = self.family.model()(ids, use_cache=True).cache
        solved = [one.layers[-1].keys for one in (cache, exact)]  # the layers before may be explicit
        error = (solved[0] - solved[1]).norm() / solved[1].norm()
        assert 0 < error < 0.1 and cache.get_seq_length() == 6

    @torch.no_grad()
    def test_a_neighbour_that_does_not_converge_leaves_a_row_and_its_cache_alone(self):
        model, rows = self.family.model(solver_tolerance=1e-3), random_ids(60, 6)
        evaluations = model(rows).num_evaluations
        budget = int(evaluations.min())
        easy, hard = rows[evaluations == budget][:1], rows[evaluations > budget]
        dial = dict(use_cache=True, solver_max_evaluations=budget)
        alone, together = model(easy, **dial), model(torch.cat([easy, hard[:1]]), **dial)
        assert together.converged.tolist() == [True, False]
        torch.testing.assert_close(together.logits[:1], alone.logits, rtol=0, atol=1e-12)
        keys = [output.cache.layers[-1].keys[:1] for output in (together, alone)]
        torch.testing.assert_close(*keys, rtol=0, atol=1e-12)

    @torch.no_grad()
    @pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
    def test_caches_under_autocast(self, kind):
        model = self.family.model(solver_tolerance=1e-2).float()
        ids = random_ids(2, 8)
        cache = kind(config=model.config, max_cache_len=8) if kind is StaticCache else kind(config=model.config)
        with torch.autocast("cpu", torch.bfloat16):
            logits = torch.cat(
                [model(piece, cache=cache, use_cache=True).logits for piece in ids.split([5, 1, 1, 1], 1)], 1
            )
        assert (logits - model(ids).logits).norm() < 0.05 * logits.norm()

    def test_greedy_generation_equals_decoding_without_cache(self, fields):
        model, ids = self.family.model(**fields | TIGHT), random_ids(2, 5)
        expected = greedy_without_cache(model, ids, SHORT["max_new_tokens"])
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(ids, **SHORT, **cache), expected), cache

    def test_left_padded_batches(self, decoding_fields):
        model = self.family.model(**decoding_fields | TIGHT)
        rows = [random_ids(1, length) for length in (3, 7, 5)]
        expected = [model.generate(row, **SHORT)[0, row.shape[1] :] for row in rows]
        assert len(torch.stack(expected).unique()) > 1  # else every mask would do
        ids = torch.cat([pad(row, (7 - row.shape[1], 0)) for row in rows])
        mask = (ids != 0).long()
        for cache in (None, "static"):
            batch = model.generate(ids, attention_mask=mask, **SHORT, cache_implementation=cache)
            assert torch.equal(batch[:, 7:], torch.stack(expected)), cache

    def test_beam_search(self, decoding_fields):
        model = self.family.model(**decoding_fields | TIGHT)
        beams = dict(SHORT, num_beams=3, return_dict_in_generate=True, output_scores=True)
        cached, uncached = (
            model.generate(ids, **beams, use_cache=use) for ids in [random_ids(2, 4)] for use in (True, False)
        )
        assert torch.equal(cached.sequences, uncached.sequences)
        torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, rtol=0, atol=1e-5)

    def test_prompt_lookup_and_assisted_decoding_crop_the_cache(self, decoding_fields):
        model = self.family.model(**decoding_fields | TIGHT)
        ids = random_ids(1, 4).repeat(1, 3)
        expected = greedy_without_cache(model, ids, SHORT["max_new_tokens"])
        assert torch.equal(model.generate(ids, **SHORT, prompt_lookup_num_tokens=3), expected)
        torch.manual_seed(1)
        assistant = type(model)(model.config).double().eval()
        assert torch.equal(model.generate(ids, **SHORT, assistant_model=assistant), expected)

    def test_sampling_follows_the_seed(self):
        model = self.family.model()
        ids = random_ids(2, 4)
        samples = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            samples.append(
                model.generate(ids, do_sample=True, top_k=0, max_new_tokens=10, eos_token_id=None, use_cache=use_cache)
            )
        assert torch.equal(*samples)

    def test_the_dial_reaches_generate_and_misspelt_dials_do_not_pass(self):
        model, evaluations = self.family.model(), []
        model.model.register_forward_hook(
            lambda module, args, output: evaluations.append(output.num_evaluations.max().item())
        )
        ids = random_ids(1, 4)
        model.generate(ids, **GREEDY)
        precise = sum(evaluations)
        evaluations.clear()
        model.generate(ids, **GREEDY, solver_tolerance=1e-2)
        assert sum(evaluations) < precise / 2
        evaluations.clear()
        with pytest.warns(UserWarning, match="Raise max_evaluations"):
            model.generate(ids, **GREEDY, solver_max_evaluations=2)
        assert max(evaluations) == 2
        with pytest.raises(ValueError, match="solver_tolerence"):
            model.generate(ids, **GREEDY, solver_tolerence=1e-2)

    @pytest.mark.parametrize(
        "way, rows",
        [
            ({}, 2),
            ({"use_cache": False}, 2),
            ({"cache_implementation": "static"}, 2),
            ({"do_sample": True, "num_return_sequences": 2}, 4),
            ({"num_beams": 3}, 6),
            ({"prefill_chunk_size": 2}, 2),
        ],
    )
    def test_generate_reports_every_solve(self, way, rows):
        model = self.family.model()
        solves = recorded_solves(model)
        output = model.generate(random_ids(2, 5), **REPORTED | way)
        for name in ("num_evaluations", "residual", "converged"):
            assert len(output[name]) == 12 and output[name][0].shape == (rows,)
            assert all(
                torch.equal(report, solve[name]) for report, solve in zip(output[name], solves[-12:], strict=True)
            )
        assert torch.cat(output.converged).all() and torch.cat(output.num_evaluations).max() <= 200
        assert output.num_evaluations is output["num_evaluations"]

    def test_a_looser_dial_is_reported(self):
        model, ids = self.family.model(), random_ids(2, 5)
        precise, loose = (model.generate(ids, **REPORTED, **dial) for dial in ({}, {"solver_tolerance": 1e-2}))
        assert sum(loose.num_evaluations).max() < sum(precise.num_evaluations).min() / 2
        model.generation_config.return_dict_in_generate = True
        short = model.generate(ids, **GREEDY, solver_max_evaluations=2)
        assert set(torch.cat(short.num_evaluations).tolist()) <= {2, 3} and not torch.cat(short.converged).any()

    def test_reports_are_of_one_call_in_one_thread(self):
        model, ids = self.family.model(solver_tolerance=1e-2), random_ids(1, 5)
        elsewhere = []

        def generate_elsewhere():
            with ThreadPoolExecutor(1) as thread:
                elsewhere.append(thread.submit(model.generate, ids, **REPORTED | {"max_new_tokens": 3}).result())

        output = model.generate(ids, **REPORTED, streamer=Interrupting(generate_elsewhere))
        assert len(output.num_evaluations) == 12 and {len(other.num_evaluations) for other in elsewhere} == {3}

    def test_nothing_is_recorded_unless_asked_for(self):
        model, ids, seen = self.family.model(), random_ids(1, 5), []
        assert isinstance(
            model.generate(ids, **GREEDY, streamer=Interrupting(lambda: seen.append(_reports.get()))), torch.Tensor
        )
        assert len(seen) == 13 and set(seen) == {None}

        def fail():
            seen.append(_reports.get())
            raise InterruptedError

        with pytest.raises(InterruptedError):
            model.generate(ids, **REPORTED, streamer=Interrupting(fail))
        assert seen[-1] == [] and _reports.get() is None

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_drafts_change_nothing(self, adaptive):
        """Nor is a padding token that is generated, as by the untrained adaptive head, taken for padding."""
        if adaptive and "cutoffs" not in type(self.family.config()).__dataclass_fields__:
            pytest.skip("this family has no adaptive softmax")
        head = {"cutoffs": [9, 30]} if adaptive else {}
        model = self.family.model(**head, solver_tolerance=1e-7)
        draft = model.draft(solver_max_evaluations=4)
        for ids in (random_ids(1, 1), random_ids(1, 9)):
            expected = model.generate(ids, **REPORTED)
            drafted = model.generate(ids, **REPORTED, assistant_model=draft)
            assert torch.equal(drafted.sequences, expected.sequences)
            assert len(drafted.num_evaluations) < 12 and torch.cat(drafted.converged).all()

    def test_a_draft_has_the_weights_of_the_model_and_a_dial_of_its_own(self, tmp_path):
        self.family.model(solver_tolerance=1e-6).save_pretrained(tmp_path)
        model, ids = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), random_ids(1, 4)
        draft = model.draft()
        pairs = list(zip(model.parameters(), draft.parameters(), strict=True))
        assert pairs and all(ours is theirs for ours, theirs in pairs)
        assert (model.config.solver_tolerance, draft.config.solver_tolerance) == (1e-6, 0.1)
        assert model.generation_config.num_assistant_tokens is None
        solves, drafted = recorded_solves(model), recorded_solves(draft)
        model.generate(ids, **GREEDY, assistant_model=draft, solver_tolerance=1e-8)
        assert max(solve.residual.max() for solve in solves) <= 1e-8 < min(solve.residual.min() for solve in drafted)
        expected = model.generate(ids, **GREEDY)
        draft.float()
        assert model.dtype == torch.float32 and model.generate(ids, **GREEDY).shape == expected.shape
        draft.double()
        del draft, drafted
        assert model.generate(ids, **GREEDY).shape == expected.shape

    def test_drafts_that_are_no_drafts(self):
        model = self.family.model(solver_tolerance=1e-2, solver_max_evaluations=10)
        for dial in ({"solver_tolerance": 1e-2}, {"solver_tolerance": 1e-3, "solver_max_evaluations": 10}):
            with pytest.raises(ValueError, match="costs as much as the model, which has 0.01 and 10: raise the one or"):
                model.draft(**dial)
        with pytest.raises(ValueError, match="solver_max_evaluations must be at least 1, got 0"):
            model.draft(solver_max_evaluations=0)
        for fields in ({"gradient": "unrolled"}, {"solver_scope": "sequence"}):
            with pytest.raises(ValueError, match="cache"):
                self.family.model(**fields, solver_tolerance=1e-2).draft()

    def test_drafts_of_the_first_layers_are_refused(self):
        model, ids = self.family.model(), random_ids(1, 5)
        for how in ({"assistant_early_exit": 1}, {"generation_config": GenerationConfig(assistant_early_exit=1)}):
            with pytest.raises(ValueError, match=r"an equilibrium has no stack: pass assistant_model=model.draft\(\)"):
                model.generate(ids, **how, max_new_tokens=2)
        assert model.generate(ids, max_new_tokens=2).shape[1] > 5

    def test_a_static_cache_may_be_filled_in_chunks(self):
        model, ids = self.family.model(), random_ids(1, 7)
        greedy = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
        chunked = model.generate(ids, **greedy, cache_implementation="static", prefill_chunk_size=3)
        assert torch.equal(chunked, model.generate(ids, **greedy))

    def test_the_dial_is_for_the_model_and_may_stand_in_a_generation_config(self):
        model, ids = self.family.model(), random_ids(1, 5)
        loose = GenerationConfig(**REPORTED, solver_max_evaluations=2, pad_token_id=0)
        assert set(torch.cat(model.generate(ids, loose).num_evaluations).tolist()) <= {2, 3}
        assert min(model.generate(ids, loose, solver_max_evaluations=9).num_evaluations) > 3
        explicit = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=8, n_layer=1, n_head=1, n_positions=32)).double()
        drafted = model.generate(ids, **GREEDY, assistant_model=explicit, solver_tolerance=1e-9)
        assert torch.equal(drafted, model.generate(ids, **GREEDY))

    @pytest.mark.slow
    def test_compiled_decoding(self):
        """As torch.compile traces it (`backend="eager"` spares the code generation): solves cannot stop early there."""
        model, ids = self.family.model(solver_tolerance=1e-3, solver_max_evaluations=5), random_ids(1, 5)
        arguments = REPORTED | {"max_new_tokens": 5}
        expected = {cache: model.generate(ids, **arguments, cache_implementation=cache) for cache in (None, "static")}
        torch._dynamo.reset()  # a limit on recompilations holds for all models of the process
        torch._dynamo.utils.counters.clear()
        model.forward = torch.compile(model.forward, backend="eager")
        for cache, eager in expected.items():
            compiled = model.generate(ids, **arguments, cache_implementation=cache)
            assert torch.equal(compiled.sequences, eager.sequences)
            assert len(compiled.num_evaluations) == 5
        model._compiled_call = model.forward  # as the library keeps what it compiled
        assert not hasattr(model.draft(solver_max_evaluations=2), "_compiled_call")
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0 and not model._can_compile_fullgraph

    def test_continuing_from_a_returned_cache(self):
        model = self.family.model()
        ids = random_ids(1, 5)
        first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, random_ids(1, 3)], 1)
        continued = model.generate(longer, **GREEDY, cache=first.cache)
        assert torch.equal(continued, greedy_without_cache(model, longer, 12))

    def test_generation_from_embeddings_and_chunked_prefill(self):
        model = self.family.model()
        ids = random_ids(1, 6)
        expected = greedy_without_cache(model, ids, 12)
        assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY), expected[:, 6:])
        assert torch.equal(model.generate(ids, **GREEDY, prefill_chunk_size=4), expected)

    @pytest.fixture
    def tokenizer(self):
        vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 61)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
        )

    def test_pipeline_and_streamer(self, tokenizer):
        model = self.family.model()
        prompts = ["w5 w6 w7", "w9"]
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        batched = generator(prompts, batch_size=2, do_sample=False, max_new_tokens=5)
        alone = [generator(prompt, do_sample=False, max_new_tokens=5) for prompt in prompts]
        assert [text[0]["generated_text"] for text in batched] == [text[0]["generated_text"] for text in alone]
        assert batched[0][0]["generated_text"].startswith("w5 w6 w7")
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        inputs = tokenizer(prompts[0], return_tensors="pt")
        ids = model.generate(**inputs, **GREEDY, streamer=streamer)
        assert "".join(streamer).split() == tokenizer.decode(ids[0, 3:]).split()

    def test_generation_starts_from_nothing_but_the_bos_token(self):
        assert self.family.model().generate(max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 5)
