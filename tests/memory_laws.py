"""The laws of a memory over segments, for every model family that has one.

A test class that derives from `MemoryLaws` and names its `family` inherits a test of each law.
"""

import pytest
import torch
from families import Family, random_ids


@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
class MemoryLaws:
    family: Family

    def test_segments_with_memory_equal_the_whole_text(self, fields):
        if fields.get("num_hidden_layers", 1) > 1:
            pytest.skip("the memory of several layers is the state of the last one, as in torchdeq")
        model = self.family.model(**self.family.remembering, **fields)
        ids = random_ids(2, 14)
        memory, logits = None, []
        for piece in ids.split([5, 1, 6, 2], 1):
            output = model(piece, memory=memory, use_cache=False)
            memory = output.memory
            logits.append(output.logits)
        assert not any(state.requires_grad for state in memory)
        assert (torch.cat(logits, 1) - model(ids).logits).abs().max() <= 1e-8

    @pytest.mark.parametrize("how", [dict(gradient="unrolled"), dict(solver_scope="sequence")])
    def test_memory_goes_where_a_cache_cannot(self, how):
        model = self.family.model(**self.family.remembering, **how)
        ids = random_ids(2, 8)
        parts, memory = [], None
        for piece in ids.split([4, 4], 1):
            output = model(piece, memory=memory)
            memory = output.memory
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), self.family.model()(ids).logits, rtol=0, atol=1e-8)

    def test_memory_does_not_look_ahead(self):
        model = self.family.model(**self.family.remembering)
        ids = random_ids(1, 6)
        memory = model(ids).memory
        changed = torch.cat([ids[:, :4], random_ids(1, 2)], 1)
        dial = dict(memory=memory, solver_max_evaluations=3)
        difference = model(ids, **dial).logits - model(changed, **dial).logits
        assert difference[:, :4].abs().max() <= 1e-12

    def test_memory_and_a_cache_exclude_each_other(self):
        model = self.family.model(**self.family.remembering)
        first = model(random_ids(1, 4), use_cache=True)
        with pytest.raises(ValueError, match="memory and cache.*pass one of them"):
            model(random_ids(1, 4), memory=first.memory, cache=first.cache, attention_mask=torch.ones(1, 4))

    def test_bad_memories_are_refused(self):
        model = self.family.model(**self.family.remembering)
        ids, memory = random_ids(2, 4), model(random_ids(2, 5)).memory
        with pytest.raises(ValueError, match="output of this model for the same 3 rows"):
            model(random_ids(3, 4), memory=memory)
        parts = (memory[0], memory[1][..., :-1]), (memory[0], memory[1][:, :-1])
        flat = tuple(state[0, 0] for state in memory)
        for other in ((), memory[:1], memory[0], flat, *parts):
            with pytest.raises(ValueError, match=r"output of this model.*states of shapes \[\(2, .*, \d+\)\]; got"):
                model(ids, memory=other)
        with pytest.raises(ValueError, match="attention_mask must be"):
            model(ids, memory=memory, attention_mask=torch.ones(1, 3))
        padding = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
        with pytest.raises(ValueError, match="no padding: pass segments of one length"):
            model(ids, memory=memory, attention_mask=padding)
        hidden = torch.ones(2, memory[0].shape[1] + 4, dtype=torch.long)
        hidden[:, -4:] = 0
        padded = torch.ones(2, 1, 4, 4).tril().bool()
        padded[0, :, :, 0] = False
        for mask in (hidden, padded):
            with pytest.raises(ValueError, match="no padding: pass segments of one length"):
                model(ids, memory=memory, attention_mask=mask)
        for queries in (1, 4):
            wide = torch.ones(2, 1, queries, memory[0].shape[1] + queries).bool()
            with pytest.raises(ValueError, match="4D attention_mask after a memory is for the new positions only"):
                model(ids[:, :queries], memory=memory, attention_mask=wide)
        assert model(ids, attention_mask=padding).memory is None
        given = model(ids, memory=memory, attention_mask=torch.ones(2, 4, dtype=torch.long))
        assert torch.equal(given.logits, model(ids, memory=memory).logits)
        causal = torch.ones(2, 1, 4, 4).tril().bool()
        assert torch.equal(model(ids, memory=memory, attention_mask=causal).logits, given.logits)

    def test_generation_goes_on_from_a_memory_without_a_cache(self):
        model = self.family.model(**self.family.remembering)
        ids = random_ids(1, 9)
        memory = model(ids[:, :5]).memory
        how = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        step = model.generate(ids[:, 5:], memory=memory, use_cache=False, **how)
        torch.testing.assert_close(step.logits[0], model(ids).logits[:, -1].float(), rtol=0, atol=1e-6)
        with pytest.raises(ValueError, match="generate makes a cache of its own; use_cache=False"):
            model.generate(ids[:, 5:], memory=memory, **how)

    def test_activation_checkpointing_of_unrolled_applications_after_a_memory(self):
        ids, before, gradients = random_ids(2, 6), random_ids(2, 5), []
        for checkpointing in (False, True):
            model = self.family.model(**self.family.remembering).train()
            memory = model(before, use_cache=False).memory
            if checkpointing:
                model.activation_checkpointing_enable()
            model(ids, labels=ids, memory=memory, use_cache=False, unroll_steps=4).loss.backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
