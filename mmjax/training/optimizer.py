"""Optimizers of the published recipes, as optax chains, with the partition of the parameters that they train."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.training.partition import FROZEN, TRAINABLE, Partition
from mmjax.types import Array, Float, Int, Params

Schedule = Callable[[Any], Any]
LEARNING_RATE_SCALE = "learning_rate_scale"
"""The hyper-parameter that multiplies every update: a learning rate that can be ablated without a recompile."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Gradient transformations by label, over the trainable part of the parameters alone.

    Attributes:
        transforms: label -> transformation, or one transformation for everything trainable.
        partition: labels of the parameter tree; "frozen" leaves never reach optax.
        clip_norm: the global norm, over all trainable leaves, to which gradients are clipped first.
    """

    transforms: optax.GradientTransformation | Mapping[str, optax.GradientTransformation]
    partition: Partition = dataclasses.field(default_factory=Partition)
    clip_norm: float | None = None

    def _chain(self, trainable: Params) -> optax.GradientTransformationExtraArgs:
        transforms: dict[Any, optax.GradientTransformation]
        if isinstance(self.transforms, optax.GradientTransformation):
            transforms = {TRAINABLE: self.transforms}
        else:
            transforms = dict(self.transforms)
        labels = self.partition.label_tree(trainable)
        unknown = set(jax.tree.leaves(labels)) - transforms.keys() - {FROZEN}
        if unknown:
            raise MmjaxError(
                f"the partition uses labels {sorted(unknown)} that have no optimizer: {sorted(transforms)}"
            )
        chain = optax.partition(transforms, labels)
        if self.clip_norm is not None:
            chain = optax.chain(optax.clip_by_global_norm(self.clip_norm), chain)
        return optax.with_extra_args_support(chain)

    def init(self, params: Params) -> Any:
        """The optimizer's state for the trainable leaves of the whole parameter tree."""
        trainable, _ = self.partition.split(params)
        return self._chain(trainable).init(trainable)

    def update(
        self,
        grads: Params,
        opt_state: Any,
        trainable: Params,
        hparams: Mapping[str, Float[Array, ""]],
        step: Int[Array, ""],
    ) -> tuple[Any, Any]:
        """(updates, next state) for the trainable subtree; schedules are evaluated at `step`, `TrainState.step`."""
        updates, opt_state = self._chain(trainable).update(grads, _at_step(opt_state, step), trainable)
        if LEARNING_RATE_SCALE in hparams:
            updates = jax.tree.map(lambda update: hparams[LEARNING_RATE_SCALE] * update, updates)
        return updates, opt_state


def _at_step(opt_state: Any, step: Int[Array, ""]) -> Any:
    """The state of optax's schedules set to a step. They count their calls, of which a refused update is none."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda node: node._replace(count=step) if is_schedule(node) else node, opt_state, is_leaf=is_schedule
    )


def warmup_cosine(peak: float, steps: int, warmup: int = 0, end: float = 0.0) -> Schedule:
    """Linear to `peak` over `warmup` steps, then half a cosine to `end` (open_clip scheduler.py:38-53).

    Step 0 already takes peak / warmup, as open_clip does; MoCo v3 and the original ViT start at exactly 0:
    `delayed(warmup_cosine(...))`.
    """
    if steps <= warmup:
        raise MmjaxError(f"--steps {steps} leaves nothing after a --warmup of {warmup} steps")

    def schedule(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        rising = peak * (step + 1) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / (steps - warmup), 0.0, 1.0)
        falling = end + 0.5 * (peak - end) * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, rising, falling)

    return schedule


def linear_warmup_cosine(peak: float, steps: int, warmup: int, end: float = 0.0) -> Schedule:
    """The same with step 0 at exactly 0 (MoCo v3 main_moco.py adjust_learning_rate; ViT utils.py:43-82)."""
    after = warmup_cosine(peak, steps, warmup, end)
    return lambda step: jnp.where(step < warmup, peak * jnp.asarray(step, jnp.float32) / max(warmup, 1), after(step))


def warmup_linear(peak: float, steps: int, warmup: int = 0) -> Schedule:
    """From exactly 0 linearly to `peak` over `warmup` steps, then down the line from `peak` at step 0 to 0 at `steps`
    (google-research/bert optimization.py:25-60): at step `warmup` a small jump, to peak * (1 - warmup / steps)."""
    if steps <= warmup:
        raise MmjaxError(f"--steps {steps} leaves nothing after a --warmup of {warmup} steps")

    def schedule(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        return peak * jnp.where(step < warmup, step / max(warmup, 1), 1 - jnp.minimum(step, steps) / steps)

    return schedule


def per_epoch(schedule: Schedule, steps_per_epoch: int) -> Schedule:
    """Holds a schedule over *epochs* constant within each epoch, as MoCo v1/v2 and torchvision step it."""
    return lambda step: schedule(jnp.asarray(step) // steps_per_epoch)


def blockwise_warmup_cosine(
    peak: float, epochs: int, steps_per_epoch: int, warmup: int = 0, start: float = 0.0, end: float = 0.0
) -> Schedule:
    """From `start` to `peak` in `warmup` stairs of 100 steps in the first epoch; then each epoch has one rate, which
    follows half a cosine from `peak` to `end` (ALBEF scheduler/cosine_lr.py, Pretrain.py:53-79).

    A block's rate is set behind its first step: step 0 and the next hundred take `start`, the hundred after them the
    first stair. A first epoch that is shorter than the stairs cuts them off. The last epoch's rate is above `end`,
    which is reached at `epochs`.
    """
    if warmup < 0 or epochs < 1 or steps_per_epoch < 1:
        raise MmjaxError(f"warmup={warmup}, epochs={epochs}, steps_per_epoch={steps_per_epoch}: 0, 1 and 1 at least")

    def schedule(step: Any) -> Any:
        step = jnp.asarray(step)
        epoch, block = step // steps_per_epoch, jnp.maximum(step - 1, 0) // 100
        rising = start + (peak - start) * block / max(warmup, 1)
        falling = end + 0.5 * (peak - end) * (1 + jnp.cos(jnp.pi * jnp.minimum(epoch / epochs, 1)))
        return jnp.where((epoch == 0) & (block < warmup), rising, falling)

    return schedule


def warmup_epoch_decay(
    peak: float, steps_per_epoch: int, warmup: int, decay: float, start: float, end: float
) -> Schedule:
    """From `start` to `peak` over `warmup` steps of the first epoch; each later epoch e has one rate, peak * decay^e,
    at least `end` (BLIP utils.py:8-18)."""

    def schedule(step: Any) -> Any:
        step = jnp.asarray(step)
        epoch = step // steps_per_epoch
        rising = jnp.minimum(peak, start + (peak - start) * step / max(warmup, 1))
        return jnp.where(epoch == 0, rising, jnp.maximum(end, peak * decay**epoch))

    return schedule


def warmup_epoch_cosine(
    peak: float, epochs: int, steps_per_epoch: int, warmup: int, start: float, end: float
) -> Schedule:
    """From `start` to `peak` over `warmup` steps of the first epoch, which cuts a longer warmup off; each later epoch
    has one rate, which follows half a cosine from `peak` to `end` (LAVIS optims.py:56-132)."""

    def schedule(step: Any) -> Any:
        step = jnp.asarray(step)
        epoch = step // steps_per_epoch
        rising = jnp.minimum(peak, start + (peak - start) * step / max(warmup, 1))
        falling = end + 0.5 * (peak - end) * (1 + jnp.cos(jnp.pi * jnp.minimum(epoch / epochs, 1)))
        return jnp.where(epoch == 0, rising, falling)

    return schedule


def staircase(base: float, boundaries: tuple[int, ...], factor: float = 0.1) -> Schedule:
    """`base`, multiplied by `factor` at each boundary."""
    return optax.piecewise_constant_schedule(base, dict.fromkeys(boundaries, factor))


def matrices_only(params: Params) -> Any:
    """Weight-decay mask: leaves with two axes or more (no bias, no norm, no scalar)."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def all_but_vectors(params: Params) -> Any:
    """Weight-decay mask: all leaves but those of one axis: no bias, no norm, but scalars (ALBEF's temperature)."""
    return jax.tree.map(lambda leaf: leaf.ndim != 1, params)


def excluding(*globs: str) -> Callable[[Params], Any]:
    """Weight-decay mask: leaves with two axes or more whose path fits none of the globs."""

    def mask(params: Params) -> Any:
        return tree.map_with_path(
            lambda path, leaf: leaf.ndim > 1 and not any(tree.matches(path, glob) for glob in globs), params
        )

    return mask


def sgd(
    learning_rate: float | Schedule, momentum: float = 0.9, weight_decay: float = 0.0, mask: Any = None
) -> optax.GradientTransformation:
    """SGD in torch's form: decay joins the gradient, the rate stays outside the momentum buffer."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask) if weight_decay else optax.identity(),
        optax.trace(momentum) if momentum else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def lars(
    learning_rate: float | Schedule, momentum: float = 0.9, weight_decay: float = 1e-6, trust: float = 0.001
) -> optax.GradientTransformation:
    """LARS as MoCo v3 writes it (moco/optimizer.py): trust ratio and decay only for leaves of two axes or more.

    The rate multiplies the momentum buffer and is not inside it, unlike `optax.lars`.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, matrices_only),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), matrices_only),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def lamb(
    learning_rate: float | Schedule, weight_decay: float = 0.0, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6
) -> optax.GradientTransformation:
    """LAMB (arXiv 1904.00962), decay for leaves of two axes or more."""
    return optax.lamb(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices_only)


def adamw(
    learning_rate: float | Schedule,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mask: Any = matrices_only,
) -> optax.GradientTransformation:
    """AdamW; `mask=None` decays every leaf, as MoCo v3 does for ViT."""
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)


class Moments(NamedTuple):
    """Running means of gradients and of their squares, a leaf each a parameter."""

    mean: Any
    square: Any


def bert_adamw(
    learning_rate: float | Schedule,
    weight_decay: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    mask: Any = matrices_only,
) -> optax.GradientTransformation:
    """AdamW without bias correction, as BERT was trained (google-research/bert optimization.py:87-174).

    mask: the decayed parameters. The original excludes norms and biases by name: BERT's leaves of one axis, no others.
    The first thousand steps are larger than `adamw`'s, the twelfth 6.6 times. The recipe clips the global norm at 1
    before: `Optimizer(bert_adamw(...), clip_norm=1.0)`.
    """

    def init(params: Any) -> Moments:
        return Moments(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Moments]:
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, updates)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.square, updates)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), Moments(mean, square)

    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def layer_decay(decay: float, layer_of: Callable[[str], int], layers: int) -> optax.GradientTransformation:
    """Multiplies each update by decay ** (layers - layer): the head moves at the full rate, the stem slowest (BEiT).

    Args:
        layer_of: slash path -> depth, from 0 (embeddings) to `layers` (head).
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scaled = tree.map_with_path(lambda path, leaf: leaf * decay ** (layers - layer_of(path)), updates)
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
