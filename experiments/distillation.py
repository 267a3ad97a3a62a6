"""The value of soft labels: students of few examples, with a teacher's soft labels and with hard ones.

    python -m experiments.distillation --out runs/distillation

The digits of scikit-learn: 1,500 real scans of 8x8 pixels to learn from, 297 of other writers to be judged on. A
teacher, a perceptron with two wide hidden layers, learns from all 1,500; students, with one of 32 units, see between 2
and 32 of each class, and the teacher's logits of these alone. Students of a seed have the same examples and the same
first weights; the seeds run side by side under `vmap`. Writes `distillation.png` and `distillation.json`, and prints
accuracy as mean and sample standard deviation over seeds, and the difference to hard labels seed by seed.

Label smoothing stands beside them as a control: labels that are soft, but know nothing of what they are of.

Ten seeds, a minute on one core (teacher 92.6 %): at 2, 4, 8, 16, 32 examples of a class hard labels give 69.3, 78.5,
81.4, 85.6, 89.1 %, soft ones at temperature 4 give 7.1, 5.4, 5.2, 3.4, 1.4 points more; at temperature 1, where this
teacher is as sure as a label, and with smoothing there is no gain.
"""

import argparse
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from experiments.resnet_depth import digits
from mmjax.evaluation.bootstrap import OverSeeds, over_seeds
from mmjax.nn.transformer import Dense
from mmjax.objectives.classification import smooth, soft_labels
from mmjax.objectives.distillation import distillation_loss
from mmjax.types import Array

CLASSES = 10
EXAMPLES = (2, 4, 8, 16, 32)
"""Training examples of each class."""
ARMS = {
    "hard": (1.0, 0.0),
    "smoothed": (1.0, 1.0),
    "soft, T = 1": (1.0, 1.0),
    "soft, T = 4": (4.0, 1.0),
    "both, T = 4": (4.0, 0.5),
}
"""Temperature and share of the soft part."""
SMOOTHING = 0.1


class Perceptron(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for width in self.widths:
            x = nn.relu(Dense(width)(x))
        return Dense(CLASSES)(x)


TEACHER, STUDENT = Perceptron((256, 256)), Perceptron((32,))


def data() -> tuple[Array, Array, Array, Array]:
    """(images [n, 64], labels [n]) to learn from and to be judged on."""
    arrays = []
    for source in digits(8):
        arrays += [jnp.asarray(source.columns["image"])[..., 0].reshape(len(source), -1), source.columns["label"]]
    return tuple(jnp.asarray(x) for x in arrays)  # type: ignore[return-value]


def fit(model: Perceptron, rng: Any, images: Array, labels: Array, soft: Array, setting: Any, steps: int) -> Any:
    """Parameters after so many steps of AdamW, each on all examples. setting: temperature and alpha."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-2)
    params = model.init(rng, images)

    def loss(params: Any) -> Array:
        return distillation_loss(model.apply(params, images), soft, labels, *setting).mean()  # type: ignore[arg-type]

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
    return params


def accuracy(logits: Array, labels: Array) -> Array:
    """Percent."""
    return 100 * jnp.mean(jnp.argmax(logits, -1) == labels)


def sampled(seed: int, labels: np.ndarray, each: int) -> np.ndarray:
    """Indices of `each` examples of every class."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.choice(np.flatnonzero(labels == c), each, replace=False) for c in range(CLASSES)])


def students(seeds: int, steps: int, logits: Array, arrays: tuple[Array, ...]) -> dict[str, dict[int, list[float]]]:
    """Test accuracy by arm, examples of a class and seed. logits: the teacher's, of all training examples."""
    images, labels, test_images, test_labels = arrays

    @jax.jit
    def accuracies_of(keys: Any, indices: Array, soft: Array, setting: Any) -> Array:
        train = functools.partial(fit, STUDENT, steps=steps, setting=setting)
        params = jax.vmap(train)(keys, images[indices], labels[indices], soft[indices])
        return jax.vmap(lambda p: accuracy(STUDENT.apply(p, test_images), test_labels))(params)  # type: ignore[arg-type]

    smoothed = jnp.log(smooth(soft_labels(labels, CLASSES), SMOOTHING))
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    accuracies: dict[str, dict[int, list[float]]] = {arm: {} for arm in ARMS}
    for each in EXAMPLES:
        indices = jnp.asarray(np.stack([sampled(seed, np.asarray(labels), each) for seed in range(seeds)]))
        for arm, (temperature, alpha) in ARMS.items():
            setting = (jnp.float32(temperature), jnp.float32(alpha))
            accuracies[arm][each] = accuracies_of(
                keys, indices, smoothed if arm == "smoothed" else logits, setting
            ).tolist()
    return accuracies


def table(accuracies: dict[str, dict[int, list[float]]]) -> str:
    """Accuracy, and below it the difference to hard labels."""
    lines = ["examples of a class".ljust(22) + "".join(f"{each:>18}" for each in EXAMPLES)]
    for arm, values in accuracies.items():
        lines.append(arm.ljust(22) + "".join(f"{_short(over_seeds(values[each])):>18}" for each in EXAMPLES))
    lines.append("more than hard labels")
    for arm in list(accuracies)[1:]:
        gains = [np.subtract(accuracies[arm][each], accuracies["hard"][each]) for each in EXAMPLES]
        lines.append(f"  {arm}".ljust(22) + "".join(f"{_short(over_seeds(gain.tolist()), '+'):>18}" for gain in gains))
    return "\n".join(lines)


def _short(result: OverSeeds, sign: str = "") -> str:
    return f"{result.mean:{sign}.2f} ± {result.std or 0:.2f}"


def plot(accuracies: dict[str, dict[int, list[float]]], teacher: float, file: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (arm, values) in enumerate(accuracies.items()):
        results = [over_seeds(values[each]) for each in EXAMPLES]
        positions = np.array(EXAMPLES) * 1.03 ** (i - len(accuracies) / 2)
        axis.errorbar(
            positions, [x.mean for x in results], [x.std or 0 for x in results], label=arm, capsize=3, marker="o"
        )
    axis.axhline(teacher, color="grey", linestyle="--", label="teacher")
    axis.set(xscale="log", xlabel="examples of a class", ylabel="test accuracy, %, mean and sd over seeds")
    axis.set_xticks(EXAMPLES, [str(each) for each in EXAMPLES], minor=False)
    axis.minorticks_off()
    axis.set_title("Digits: students with hard and with soft labels")
    axis.legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    arrays = data()
    images, labels, test_images, test_labels = arrays
    train = functools.partial(fit, TEACHER, steps=options.steps, setting=(1.0, 0.0))
    params = jax.jit(train)(jax.random.key(0), images, labels, jnp.zeros((len(labels), CLASSES)))
    logits: Any = TEACHER.apply(params, images)
    teacher = float(accuracy(TEACHER.apply(params, test_images), test_labels))  # type: ignore[arg-type]
    accuracies = students(options.seeds, options.steps, logits, arrays)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"teacher": teacher, "seeds": options.seeds, "steps": options.steps, "accuracy": accuracies}
    (options.out / "distillation.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(accuracies, teacher, options.out / "distillation.png")
    print(f"teacher {teacher:.2f} %; students, test accuracy in %, mean ± sample sd of {options.seeds} seeds")
    print(table(accuracies))


if __name__ == "__main__":
    main()
