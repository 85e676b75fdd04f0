"""Tests that every model must pass; subclass :class:`ModelContract` with one method.

    from causal_lm.testing import ModelContract

    class TestMyModel(ModelContract):
        def make_model(self):
            return MyModel(vocab_size=self.vocab_size, ...)

``pytest`` then runs the whole contract on it (see ``examples/``).
"""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from causal_lm.data.collate import Batch, Collate, pack
from causal_lm.data.documents import Document
from causal_lm.models.base import CausalModel
from causal_lm.module import CausalLM
from causal_lm.objective import LossConfig
from causal_lm.optim.parameter_groups import parameter_groups
from causal_preflight.lightning import audit_batch

PAD = 0
ROW_LENGTH = 16  # slots of a packed row


class ModelContract:
    """Tests that a model must pass, on documents of up to 12 tokens in rows of up to 16. Define
    :meth:`make_model`; override the attributes where needed."""

    vocab_size = 19
    lengths = (5, 3, 12, 7, 4)  # tokens of each test document, BOS and EOS counted
    tolerance = 1e-5  # largest difference of logits between runs that must agree
    learning_rate = 1e-2
    overfit_steps = 300

    def make_model(self) -> CausalModel:
        """A new, small model with :attr:`vocab_size` tokens. Called after seeding."""
        raise NotImplementedError

    def model(self) -> Any:
        """The model from a fixed seed, in eval mode."""
        torch.manual_seed(0)
        model = self.make_model()
        assert isinstance(model, nn.Module) and isinstance(model, CausalModel)
        return model.eval()

    def documents(self) -> list[Document]:
        """Random documents ``BOS … EOS`` (ids 1 and 2)."""
        draw = partial(torch.randint, generator=torch.Generator().manual_seed(0))
        return [_document(draw(3, self.vocab_size, (n - 2,))) for n in self.lengths]

    def batch(self, packed: bool = False) -> Batch:
        """All documents, one per row or packed."""
        row_length = ROW_LENGTH if packed else None
        return Collate(PAD, self.vocab_size, row_length=row_length)(self.documents())

    @staticmethod
    @torch.no_grad()
    def logits(model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, T, V) of the batch, without gradients."""
        return model(batch.input_ids, batch.position_ids, batch.attention_mask)

    def assert_close(self, found: Tensor, expected: Tensor, times: float = 1.0) -> None:
        """The two agree within ``times`` the :attr:`tolerance`."""
        limit = times * self.tolerance
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit)

    def test_preflight_finds_no_fault(self) -> None:
        """On padded and on packed rows."""
        for packed in (False, True):
            module = CausalLM(self.model())
            loss = module.accumulated_loss
            report = audit_batch(module, self.batch(packed), loss, pad_id=PAD, eos_id=2)
            assert not report.faults, str(report)
            assert {"alignment", "future"} <= set(report.passed), str(report)

    def test_packed_rows_give_the_logits_of_padded_rows(self) -> None:
        model, padded, packed = self.model(), self.batch(), self.batch(packed=True)
        assert len(packed.input_ids) < len(padded.input_ids)
        expected, found = self.logits(model, padded), self.logits(model, packed)
        rows, numbers, _ = pack(self.lengths, ROW_LENGTH)
        for i, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            alone, here = padded.document_ids[i] >= 0, packed.document_ids[row] == number
            assert torch.equal(packed.input_ids[row, here], padded.input_ids[i, alone])
            self.assert_close(found[row, here], expected[i, alone])

    def test_plain_causal_and_the_explicit_mask_agree(self) -> None:
        model, batch, explicit = self.model(), self.batch(), self.batch()
        assert batch.attention_mask.plain_causal
        explicit.attention_mask = replace(batch.attention_mask, plain_causal=False)
        real = batch.document_ids >= 0
        self.assert_close(self.logits(model, explicit)[real], self.logits(model, batch)[real])

    def test_the_chunked_loss_is_the_whole_loss(self) -> None:
        """Loss and gradients; only for models that declare ``lm_head``."""
        if self.model().lm_head is None:
            return
        losses, gradients = [], []
        for chunk in (None, 3):
            module = CausalLM(self.model(), loss=LossConfig(chunk_tokens=chunk))
            loss = module.accumulated_loss(self.batch())
            loss.backward()
            losses.append(loss.detach())
            gradients.append([p.grad for p in module.parameters() if p.grad is not None])
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)

    def test_the_cache_gives_the_logits_of_the_whole_row(self) -> None:
        """A prompt of three tokens, then one at a time; only for models with a cache."""
        model = self.model()
        cache = model.make_cache()
        if cache is None:
            return
        ids = self.documents()[2].tokens[None].expand(2, -1)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        splits = [0, 3, *range(4, ids.shape[1] + 1)]
        with torch.no_grad():
            cached = torch.cat([
                model(ids[:, start:end], positions[:, start:end], None, cache)
                for start, end in itertools.pairwise(splits)
            ], dim=1)  # fmt: skip
            whole = model(ids, positions)
        self.assert_close(cached, whole, times=10)

    def test_a_checkpoint_round_trip_keeps_the_logits(self) -> None:
        """The weights of one model, loaded into another from a different seed."""
        first = self.model()
        torch.manual_seed(1)
        second: Any = self.make_model()
        second.load_state_dict(first.state_dict(), strict=True)
        batch = self.batch()
        assert torch.equal(self.logits(first, batch), self.logits(second.eval(), batch))

    def test_every_parameter_is_in_one_optimizer_group(self) -> None:
        model = self.model()
        grouped = [id(p) for group in parameter_groups(model) for _, p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)

    def test_overfits_ten_documents(self) -> None:
        """The loss of every token after the second falls below 0.05 nats."""
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(3, self.vocab_size, (10, 8), generator=generator)
        rows[:, 1] = torch.arange(10) % (self.vocab_size - 3) + 3  # identifies the document
        loss_mask = torch.arange(10) > 2  # the first two tokens after BOS cannot be predicted
        documents = [_document(row)._replace(loss_mask=loss_mask) for row in rows]
        batch, module = Collate(PAD, self.vocab_size)(documents), CausalLM(self.model()).train()
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        for _ in range(self.overfit_steps):
            loss = module.accumulated_loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 0.05, f"the loss is still {float(loss.detach()):.3f} nats"


def _document(tokens: Tensor) -> Document:
    return Document(torch.cat([torch.tensor([1]), tokens, torch.tensor([2])]))
