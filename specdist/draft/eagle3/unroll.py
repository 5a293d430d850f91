# SPDX-License-Identifier: Apache-2.0
"""The TTT steps as one differentiable function, with its backward written out.

Written out, because autograd would keep about twice as much of every step, round the gradients of the weights to half
precision after each, and read and write the state of a step more often. What a step keeps is in `_Step`; norms and
activations are computed again. The gradients of the weights add up over the steps in fp32.

Only the rows that a loss depends on (`Rows.active`) are computed. The keys and values of step 0, which all later rows
of a document see, come from outside, and so does what the token embeddings contribute to the projections (`entry`): it
depends on the token alone and serves every step that meets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specdist.draft.common.flex import in_blocks, whole_blocks
from specdist.draft.common.precision import add_product, wide_zeros
from specdist.draft.eagle3.attention import DocumentAttention
from specdist.draft.eagle3.matmul import Matmul
from specdist.draft.eagle3.rows import Rows

if TYPE_CHECKING:
    from specdist.draft.eagle3.model import Eagle3Draft


class Weights(NamedTuple):
    """What is trained inside; [outputs, inputs], and [H] for norms. `qkv`: the halves of q, k and v that read the
    state, one below the other. The first step has products with its queries alone."""

    hidden_norm: Tensor
    qkv: Tensor
    o: Tensor
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    norm: Tensor


EARLY = ("down", "gate", "up")
"""Weights whose gradients are complete when the backward of the first step has only begun."""


@dataclass(frozen=True)
class UnrollTask:
    """What a micro-batch brings that takes no gradient.

    Attributes:
        rows: which rows are computed and what they are taught.
        attend: the attention of the active rows over the step-0 keys.
        cos: [positions, D / 2], of the angles of every position, `sin` likewise.
        matmul: how the products with the layer's weights are made.
    """

    draft: Eagle3Draft
    rows: Rows
    attend: DocumentAttention
    cos: Tensor
    sin: Tensor
    matmul: type[Matmul]


@dataclass
class _Step:
    """What the backward of a step needs. `out` and `lse` carry the graph of the attention, whose leaf is `q`. The
    gradients of gate and up take their place. None is computed again."""

    hidden: Tensor
    q: Tensor
    out: Tensor
    lse: Tensor
    middle: Tensor | None
    gate_and_up: tuple[Tensor, Tensor] | None
    after: Tensor


class Unroll(torch.autograd.Function):
    """(task, with_grad, hidden [n, H], entry [T + K, q + k + v], key [T, Hkv, D], value [T, Hkv, D], *Weights) -> the
    normed states [P, K, H] that each position is guessed from, whose gradient may come in their memory.

    `hidden` is the state of step 0 at the active rows. Row i of step k meets entry[i + 1 + k].
    """

    @staticmethod
    def forward(
        ctx: Any,
        task: UnrollTask,
        with_grad: bool,
        hidden: Tensor,
        entry: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Tensor,
    ) -> Tensor:
        # Detached: the compiler makes graphs of their own for what requires gradients.
        hidden, entry, key, value = (t.detach() for t in (hidden, entry, key, value))
        unrolled = Unrolled(task, Weights(*(t.detach() for t in rest)), entry, key, value, with_grad)
        states = unrolled.run(hidden)
        if with_grad:
            ctx.forward_was = unrolled, Weights(*rest)
        return states.detach()  # else it would keep what keeps it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        (unrolled, given), ctx.forward_was = ctx.forward_was, None
        return (None, None, *_Backward(unrolled, grad_states, given).run())


class Unrolled:
    """The forward. `states` [P, K, H] are the normed states that each position is guessed from: what a loss reads."""

    def __init__(self, task: UnrollTask, weights: Weights, entry: Tensor, key: Tensor, value: Tensor, with_grad: bool):
        self.task, self.weights, self.entry, self.with_grad = task, weights, entry, with_grad
        draft, dims = task.draft, task.draft.dims
        self.ops, self.config, self.scale, self.eps = draft.ops, draft.config, draft.scale, dims.rms_norm_eps
        # Filled up here and not in the attention, which would keep a copy for every step.
        self.key, self.value = (whole_blocks(t.detach()).detach().requires_grad_(with_grad) for t in (key, value))
        rows, steps, self.tokens = task.rows, task.rows.steps, len(key)
        own = (steps - 1, len(rows.active), *key.shape[1:])
        self.own_keys, self.own_values = key.new_empty(own), value.new_empty(own)
        layer = {"q": weights.qkv[: dims.query_width], "qkv": weights.qkv, "o": weights.o}
        self.matmul = task.matmul(layer | {"gate": weights.gate, "up": weights.up, "down": weights.down}, self.ops)
        self.states = entry.new_empty(len(rows.taught), steps, weights.norm.shape[0])
        self.tape: list[_Step] = []

    def run(self, hidden: Tensor) -> Tensor:
        """All steps; returns `states`."""
        for step in range(self.task.rows.steps):
            hidden = self._step(step, hidden)
        return self.states

    def _step(self, step: int, hidden: Tensor) -> Tensor:
        """One TTT step: from the state [n, H] of the active rows to the next one."""
        task, weights, ops, matmul, eps = self.task, self.weights, self.ops, self.matmul, self.eps
        q = self._queries(step, hidden)
        with torch.set_grad_enabled(self.with_grad):
            out, lse = task.attend(q, self.key, self.value)
        merged, _ = self.merged(step, q, out, lse)
        middle = self.middle(hidden, merged)
        gate, up = self.gate_and_up(matmul.take_norm(middle, weights.post_norm, eps))
        after = matmul.forward(matmul.take_swiglu(gate, up), "down", onto=middle)
        if self.with_grad:
            again = step < self.config.recompute
            kept = None if again else (gate, up)
            self.tape.append(_Step(hidden, q, out, lse, None if again else middle, kept, after))
        rows = task.rows.student[:, step].clamp(min=0)  # what no row reaches has no weight in the loss
        if self.config.norm_output:
            normed = ops.norm(after, weights.norm, eps)
            self.states[:, step] = normed[rows]
            return normed
        ops.state(self.states[:, step], after, rows, weights.norm, eps)
        return after

    def middle(self, hidden: Tensor, merged: Tensor) -> Tensor:
        """The state after the attention."""
        if self.config.norm_before_residual:
            hidden = self.ops.norm(hidden, self.weights.hidden_norm, self.eps)
        return self.matmul.forward(self.matmul.take(merged.flatten(1)), "o", onto=hidden)

    def gate_and_up(self, taken: Any) -> tuple[Tensor, Tensor]:
        """Of the normed state, as `Matmul.take` gives it."""
        return self.matmul.forward(taken, "gate"), self.matmul.forward(taken, "up")

    def merged(self, step: int, q: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """The attention over the own keys as well, and its log-sum-exp."""
        out, lse, q = out.detach(), lse.detach(), q.detach()[: len(out)]
        if not step:
            return out, lse
        return self.ops.merge(out, lse, q, self.own_keys[:step], self.own_values[:step], self.scale)

    def _queries(self, step: int, hidden: Tensor) -> Tensor:
        """The queries [n, Hq, D] of a step; puts the keys and values of later ones with the own ones."""
        task, count, dims = self.task, len(hidden), self.task.draft.dims
        taken = self.matmul.take_norm(hidden, self.weights.hidden_norm, self.eps)
        whole = hidden.new_empty(in_blocks(count), dims.num_attention_heads, dims.head_dim)
        whole[count:].zero_()
        parts = [whole[:count]]
        if step:
            parts += [self.own_keys[step - 1], self.own_values[step - 1]]
        product = self.matmul.forward(taken, "qkv" if step else "q")
        rows = task.rows
        self.ops.heads(product, self.entry, task.cos, task.sin, rows.active, rows.positions, step, parts)
        return whole.requires_grad_(self.with_grad)


class _Backward:
    """The backward of what was unrolled, from the last step to the first. Once.

    `given`: the weights as they came. Where somebody waits for the gradient of one, to reduce it over the ranks beside
    the rest of the backward, it is handed over as soon as it is complete, if that is long before the end (`EARLY`).
    """

    def __init__(self, unrolled: Unrolled, grad_states: Tensor, given: Weights):
        self._unrolled, self._grad_states, self._given = unrolled, grad_states, given
        self._grads = Weights._make(map(wide_zeros, unrolled.weights))
        self._entry = torch.zeros_like(unrolled.entry)
        tokens = unrolled.tokens
        self._key, self._value = wide_zeros(unrolled.key[:tokens]), wide_zeros(unrolled.value[:tokens])
        self._own_keys, self._own_values = wide_zeros(unrolled.own_keys), wide_zeros(unrolled.own_values)

    def run(self) -> tuple[Any, ...]:
        """The gradients of hidden, entry, key, value and the weights; None where it was handed over."""
        tape = self._unrolled.tape
        carry = torch.zeros_like(tape[-1].after)
        for step in reversed(range(len(tape))):
            carry = self._step(step, tape.pop(), carry)
        return carry, self._entry, self._key, self._value, *self._grads

    def _step(self, step: int, saved: _Step, carry: Tensor) -> Tensor:
        """From the gradient of the state after a step to that of the state before it."""
        unrolled, weights, grads = self._unrolled, self._unrolled.weights, self._grads
        ops, eps, matmul = unrolled.ops, unrolled.eps, unrolled.matmul
        carry = self._through_norm(step, saved, carry)

        attended = unrolled.merged(step, saved.q, saved.out, saved.lse)
        middle = unrolled.middle(saved.hidden, attended[0]) if saved.middle is None else saved.middle
        normed = ops.norm(middle, weights.post_norm, eps)
        gate, up = saved.gate_and_up or unrolled.gate_and_up(matmul.take(normed))
        act = matmul.backward(matmul.take(carry), "down")
        # In place: these are then the activations, and the gradients of gate and up.
        d_normed = matmul.gate_and_up_backward(act, gate, up)
        add_product(grads.down, carry.T, act)
        add_product(grads.gate, gate.T, normed)
        add_product(grads.up, up.T, normed)
        del act, gate, up
        if not step:
            self._hand_over()
        carry, d_weight = ops.norm_backward(d_normed, middle, weights.post_norm, eps, carry)
        grads.post_norm.add_(d_weight)

        d_product = self._through_attention(step, saved, attended, carry)

        normed = ops.norm(saved.hidden, weights.hidden_norm, eps)
        width = d_product.shape[1]
        add_product(grads.qkv[:width], d_product.T, normed)
        d_normed = matmul.backward(matmul.take(d_product), "qkv" if step else "q")
        if unrolled.config.norm_before_residual:
            d_normed, carry = d_normed + carry, torch.zeros_like(carry)
        carry, d_weight = ops.norm_backward(d_normed, saved.hidden, weights.hidden_norm, eps, carry)
        grads.hidden_norm.add_(d_weight)
        return carry

    def _hand_over(self) -> None:
        for name in EARLY:
            weight, handed_over = getattr(self._given, name), dict[str, Any]({name: None})
            if weight._post_accumulate_grad_hooks:  # noqa: SLF001  # somebody waits for it
                weight.backward(getattr(self._grads, name).to(weight.dtype))
                self._grads = self._grads._replace(**handed_over)

    def _through_norm(self, step: int, saved: _Step, carry: Tensor) -> Tensor:
        """Adds the gradient that the loss of this step gives to the state after it."""
        unrolled, weight, states = self._unrolled, self._unrolled.weights.norm, self._grad_states[:, step]
        which, ops, eps = unrolled.task.rows.teacher[:, step], unrolled.ops, unrolled.eps
        if not unrolled.config.norm_output:
            carry, d_weight = ops.state_backward(states, which, saved.after, weight, eps, carry)
        else:
            carry = ops.state_grad(states, which, carry)
            carry, d_weight = ops.norm_backward(carry, saved.after, weight, eps, torch.zeros_like(carry))
        self._grads.norm.add_(d_weight)
        return carry

    def _through_attention(self, step: int, saved: _Step, attended: tuple[Tensor, Tensor], carry: Tensor) -> Tensor:
        """From the gradient of the state after the attention to that of the projections before it. `attended`: what
        `Unrolled.merged` gives."""
        task, unrolled, matmul = self._unrolled.task, self._unrolled, self._unrolled.matmul
        merged, total = attended
        add_product(self._grads.o, carry.T, merged.flatten(1))
        q = saved.q.detach()[: len(carry)]
        d_out, d_lse = matmul.backward(matmul.take(carry), "o"), torch.zeros_like(saved.lse)
        d_out = d_out.unflatten(1, q.shape[1:])
        more = None
        if step:
            own = unrolled.own_keys[:step], unrolled.own_values[:step]
            sums = self._own_keys[:step], self._own_values[:step]
            forward = merged, total, saved.out.detach(), saved.lse.detach(), q
            d_out, d_lse, more = unrolled.ops.merge_backward(d_out, *forward, *own, unrolled.scale, *sums)
        inputs = (saved.q, unrolled.key, unrolled.value)
        d_query, d_key, d_value = torch.autograd.grad((saved.out, saved.lse), inputs, (d_out, d_lse))
        self._key += d_key[: len(self._key)]
        self._value += d_value[: len(self._value)]
        parts = [d_query[: len(carry)]]
        if step:
            parts += [self._own_keys[step - 1], self._own_values[step - 1]]
        rows = task.rows
        turned = task.cos, task.sin, rows.active, rows.positions
        return unrolled.ops.heads_backward(parts, more, *turned, step, self._entry)
