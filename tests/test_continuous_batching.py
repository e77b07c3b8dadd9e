"""Continuous batching: every request is what `generate` makes of it alone, whatever shares its row."""

import itertools

import pytest
import torch
from families import ATTRACTOR, TRANSFORMER, TRELLISNET, random_ids
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

NEW_TOKENS = 4
LENGTHS = (3, 30, 1, 7)
# Small pages, and parts of at most 16 tokens: the prompt of 30 tokens is solved in parts, beside other requests.
PAGES = dict(page_size=4, num_blocks=64, max_batch_tokens=16)
WINDOW = {"sliding_window": 5, "position_embedding_type": "relative"}


def greedy(**fields) -> GenerationConfig:
    return GenerationConfig(**({"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": -1} | fields))


def pages(**fields) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**(PAGES | fields))


def prompts_of(*lengths: int) -> list[list[int]]:
    return [random_ids(1, length)[0].tolist() for length in lengths]


def alone(model, prompt: list[int], **fields):
    """`generate` for one prompt, with the report of each pass, and its logits as the model computed them."""
    logits = []
    hook = model.register_forward_hook(lambda model, args, output: logits.append(output.logits[0, -1]))
    output = model.generate(torch.tensor([prompt]), greedy(return_dict_in_generate=True, **fields))
    hook.remove()
    return output | {"logits": torch.stack(logits), "text": output.sequences[0, len(prompt) :].tolist()}


class Spy:
    """Records what each request gets in each forward pass: which tokens are new, the report, and the last logits."""

    def __init__(self, model, monkeypatch):
        self.passes: dict[str, list[dict]] = {}
        self.rows: list[list[str]] = []  # the requests of each forward pass
        self._coming: list[str] = []
        give_pages = PagedAttentionCache.extend_read_and_write_indices

        def give_pages_to(cache, request_id, *args):
            self._coming.append(request_id)
            return give_pages(cache, request_id, *args)

        monkeypatch.setattr(PagedAttentionCache, "extend_read_and_write_indices", give_pages_to)
        model.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, model, args, arguments, output):
        ends, columns = arguments["cu_seq_lens_q"].tolist(), arguments["logits_to_keep"].tolist()
        for number, request in enumerate(self._coming):
            last = ends[number + 1] - 1
            self.passes.setdefault(request, []).append(
                {
                    "positions": arguments["position_ids"][0, ends[number] : last + 1].tolist(),
                    "logits": output.logits[0, columns.index(last)] if last in columns else None,
                    "num_evaluations": int(output.num_evaluations[number]),
                    "converged": bool(output.converged[number]),
                }
            )
        self.rows.append(self._coming)
        self._coming = []

    def logits(self, request: str) -> torch.Tensor:
        """The logits of a request's new tokens, `(tokens, vocabulary)`."""
        return torch.stack([one["logits"] for one in self.passes[request] if one["logits"] is not None])


def batched(model, prompts, config: ContinuousBatchingConfig | None = None, **fields):
    """Batch continuously. Returns each prompt with its request and the tokens generated for it."""
    outputs = model.generate_batch(prompts, greedy(**fields), config or pages())
    assert [output.error for output in outputs.values()] == [None] * len(outputs)
    return [
        (prompt, request, output.generated_tokens)
        for prompt, (request, output) in zip(prompts, outputs.items(), strict=True)
    ]


# What pages hold, and how masks and positions are made, differs in these variants.
PAGED = {
    f"{kind}-{name}": (family, family.variants[name])
    for kind, family, names in (
        (
            "transformer",
            TRANSFORMER,
            (
                *("default", "paper", "adaptive", "torchdeq", "norm_position=pre"),
                "num_hidden_layers=2-sliding_window=3-rope_parameters=linear",
                "attn_implementation=eager-position_embedding_type=relative-sliding_window=4",
                "solver=picard-attn_implementation=eager",
            ),
        ),
        ("attractor", ATTRACTOR, ("default", "published", "qwen3-like", "sliding_window=3-rope_parameters=linear")),
    )
    for name in names
}


@pytest.mark.parametrize("family, fields", PAGED.values(), ids=PAGED)
def test_each_request_is_generated_as_if_alone(family, fields, monkeypatch):
    model, prompts = family.model(**fields), prompts_of(*LENGTHS)
    expected = [alone(model, prompt) for prompt in prompts]
    spy = Spy(model, monkeypatch)
    for (_, request, text), generated in zip(batched(model, prompts), expected, strict=True):
        assert text == generated["text"]
        torch.testing.assert_close(spy.logits(request), generated["logits"], rtol=0, atol=1e-8)
    assert sum(one["positions"][0] < 30 for one in spy.passes["req_1"]) > 1  # its prompt came in parts
    assert max(len(row) for row in spy.rows) == len(prompts)


@pytest.mark.parametrize(
    "solver, attention", [("anderson", "sdpa"), ("anderson", "eager"), ("broyden", "sdpa"), ("picard", "sdpa")]
)
@pytest.mark.parametrize("dial", [dict(solver_tolerance=1e-2), dict(solver_max_evaluations=7)], ids=str)
def test_each_request_has_its_own_solve(solver, dial, attention, monkeypatch):
    """At any tolerance and budget: the same logits, evaluations and verdicts as alone, in every pass."""
    model, prompts = TRANSFORMER.model(solver=solver, attn_implementation=attention, **dial), prompts_of(*LENGTHS)
    if "solver_max_evaluations" in dial:  # the iterates wander, so the best is often not the last: one more evaluation
        for name, weight in model.model.layers.named_parameters():
            weight.data *= 3 if name.endswith("proj.weight") else 1
    expected = [alone(model, prompt) for prompt in prompts]
    spy, counts = Spy(model, monkeypatch), set()
    requests = batched(model, prompts, pages(max_batch_tokens=64))
    for (_, request, text), generated in zip(requests, expected, strict=True):
        assert text == generated["text"]
        torch.testing.assert_close(spy.logits(request), generated["logits"], rtol=0, atol=1e-9)
        seen = spy.passes[request]
        assert [one["num_evaluations"] for one in seen] == [int(count) for count in generated["num_evaluations"]]
        assert [one["converged"] for one in seen] == [bool(verdict) for verdict in generated["converged"]]
        counts |= {one["num_evaluations"] for one in seen}
    assert len(counts) > 1 and (8 in counts or "solver_tolerance" in dial)


def test_requests_join_and_leave(monkeypatch):
    model, (first, second, third) = TRANSFORMER.model(), prompts_of(5, 9, 4)
    expected = [alone(model, prompt, max_new_tokens=40) for prompt in (first, second, third)]
    spy, texts = Spy(model, monkeypatch), {}
    with model.continuous_batching_context_manager(greedy(), True, 10, pages()) as manager:
        manager.add_request(first, "long", max_new_tokens=40, streaming=True)
        manager.get_result("long", timeout=10)  # it runs when the others come
        manager.add_request(second, "short", max_new_tokens=3)
        manager.add_request(third, "middle", max_new_tokens=6)
        while len(texts) < 3:
            output = manager.get_result(timeout=10)
            if output.is_finished():
                texts[output.request_id] = output.prompt_ids + output.generated_tokens
    assert [len(texts[name]) for name in ("long", "short", "middle")] == [5 + 40, 9 + 3, 4 + 6]
    for name, generated in zip(("long", "short", "middle"), expected, strict=True):
        assert texts[name] == generated["sequences"][0, : len(texts[name])].tolist()
    assert {len(row) for row in spy.rows} >= {1, 3} and spy.rows[0] == spy.rows[-1] == ["long"]


@pytest.mark.parametrize("fields", [{}, WINDOW], ids=str)
def test_a_request_that_lost_its_pages_goes_on(fields, monkeypatch):
    """There are too few pages for all requests at once, so some are put off and solved again."""
    model, prompts = TRANSFORMER.model(**fields), prompts_of(3, 2, 3, 2)
    expected = [alone(model, prompt, max_new_tokens=14) for prompt in prompts]
    spy, few = Spy(model, monkeypatch), pages(num_blocks=3 if fields else 8, max_batch_tokens=8)
    requests = batched(model, prompts, few, max_new_tokens=14)
    for (_, _, text), generated in zip(requests, expected, strict=True):
        assert text == generated["text"]
    restarts = [
        later["positions"][0] <= earlier["positions"][-1]
        for passes in spy.passes.values()
        for earlier, later in itertools.pairwise(passes)
    ]
    assert any(restarts)


def test_a_common_beginning_is_solved_once(monkeypatch):
    model, (beginning, *endings) = TRANSFORMER.model(), prompts_of(12, 3, 5)
    expected = [alone(model, beginning + ending) for ending in endings]
    spy = Spy(model, monkeypatch)
    with model.continuous_batching_context_manager(greedy(), True, 10, pages()) as manager:
        for number, (ending, generated) in enumerate(zip(endings, expected, strict=True)):
            name = manager.add_request(beginning + ending, str(number))
            output = manager.get_result(name, timeout=10)
            assert output.prompt_ids + output.generated_tokens == generated["sequences"][0].tolist()
            torch.testing.assert_close(spy.logits(name), generated["logits"], rtol=0, atol=1e-8)
    assert spy.passes["0"][0]["positions"] == list(range(15))
    assert spy.passes["1"][0]["positions"] == list(range(12, 17))


def test_several_answers_to_one_prompt_share_its_pages(monkeypatch):
    model, (prompt,) = TRANSFORMER.model(), prompts_of(6)
    expected, spy = alone(model, prompt), Spy(model, monkeypatch)
    outputs = model.generate_batch([prompt], greedy(num_return_sequences=3, do_sample=True, top_k=1), pages())
    assert [output.generated_tokens for output in outputs.values()] == [expected["text"]] * 3
    assert sum(one["positions"][0] == 0 for passes in spy.passes.values() for one in passes) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("fields", [{}, WINDOW], ids=str)
def test_a_request_that_is_not_finite_harms_no_other(fields, value, monkeypatch):
    model = TRANSFORMER.model(tie_word_embeddings=False, **fields)
    prompts = prompts_of(*LENGTHS)
    with torch.no_grad():
        model.lm_head.weight[2] = 0
        model.model.embed_tokens.weight[2] = value
    expected = [alone(model, prompt) for prompt in prompts]
    assert all(2 not in generated["sequences"] for generated in expected)
    spy = Spy(model, monkeypatch)
    *requests, (_, broken, _) = batched(model, [*prompts, [5, 2, 9]])
    for (_, request, text), generated in zip(requests, expected, strict=True):
        assert text == generated["text"]
        torch.testing.assert_close(spy.logits(request), generated["logits"], rtol=0, atol=1e-8)
    assert not spy.passes[broken][0]["converged"]


def test_single_precision_and_the_settings_it_leaves():
    model, prompts = TRANSFORMER.model(solver_tolerance=1e-5, attn_implementation="eager").float(), prompts_of(4, 9)
    config = pages()
    outputs = model.generate_batch(prompts, greedy(), config)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert output.generated_tokens == alone(model, prompt)["text"]
    assert model.config._attn_implementation == "eager"
    assert config.auto_switch_to_flash and config.use_cuda_graph is None
    endless = TRANSFORMER.model(eos_token_id=None)
    endless.generate_batch([[3, 4]], continuous_batching_config=pages(), max_new_tokens=2)
    assert endless.generation_config.eos_token_id is None


def test_a_generate_call_may_ask_for_pages():
    model, ids = TRANSFORMER.model(), random_ids(2, 5)
    paged = dict(cache_implementation="paged", continuous_batching_config=pages())
    assert torch.equal(model.generate(ids, greedy(), **paged)[0], model.generate(ids, greedy()))
    with pytest.raises(ValueError, match="attention_mask has padding, .* one list of ids for each request"):
        mask = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
        model.generate(ids, greedy(), attention_mask=mask, **paged)


@pytest.mark.parametrize(
    ("request_", "message"), [([], "A request is empty"), ([3, 61], "must lie in .0, vocab_size=61")]
)
def test_a_bad_request_ends_no_other(request_, message):
    model, (prompt,) = TRANSFORMER.model(), prompts_of(5)
    expected = alone(model, prompt)
    with pytest.raises(ValueError, match=message):
        model.generate_batch([prompt, request_], greedy(), pages())
    with model.continuous_batching_context_manager(greedy(), True, 10, pages()) as manager:
        name = manager.add_request(prompt)
        with pytest.raises(ValueError, match=message):
            manager.add_request(request_)
        assert manager.get_result(name, timeout=10).generated_tokens == expected["text"]


def test_what_is_refused():
    model = TRANSFORMER.model()
    for field, value in (
        ("use_cuda_graph", True),
        ("use_cuda_graph", (False, True)),
        ("default_compile_level", 1),
        ("varlen_compile_config", CompileConfig()),
    ):
        with pytest.raises(ValueError, match=f"ContinuousBatchingConfig: {field}=.* leave this field out"):
            model.generate_batch([[3, 4]], greedy(), pages(**{field: value}))
    with pytest.raises(TypeError, match="takes no solver_tolerance: set model.config.solver_tolerance"):
        model.generate_batch([[3, 4]], greedy(), pages(), solver_tolerance=0.1)
    with pytest.raises(TypeError, match="takes no solver_max_evaluations: set"):
        model.init_continuous_batching(greedy(solver_max_evaluations=3))
    with pytest.raises(ValueError, match="num_beams=2: continuous batching follows one beam for each request"):
        model.generate_batch([[3, 4]], greedy(num_beams=2), pages())
    for fields in ({"gradient": "unrolled"}, {"solver_scope": "sequence"}):
        with pytest.raises(ValueError, match="cache"):
            TRANSFORMER.model(**fields).generate_batch([[3, 4]], greedy(), pages())
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="needs attn_implementation='sdpa' or 'eager', got 'flex_attention'"):
        model.init_continuous_batching()


def test_a_state_of_constant_size_has_no_pages():
    model = TRELLISNET.model()
    for start in (
        lambda: model.generate_batch([[3, 4], [5]], max_new_tokens=2),
        lambda: model.generate(random_ids(1, 4), max_new_tokens=2, cache_implementation="paged"),
        lambda: model.init_continuous_batching(),
    ):
        with pytest.raises(ValueError, match="cannot be batched continuously .* left-padded batch"):
            start()
