"""With and without shortcuts at 20, 56 and 110 layers (arXiv 1512.03385, section 4.2), on the digits of scikit-learn.

    mmjax train experiments/resnet_depth.py --depth 56 --skip none --workdir runs/plain56
    python experiments/resnet_depth.py --depths 20,56,110 --steps 400 --workdir runs/depth

The second trains every depth with and without shortcuts and writes `depth.png` and `depth.json`: training loss, test
accuracy, and the gradient of every convolution at initialisation and at the end, on one batch. 1,797 real scans of
8x8 pixels, enlarged; the paper's recipe (SGD 0.9, weight decay 1e-4, rate 0.1 with its drops at 1/2 and 3/4) but for
the length and a warm-up, which the paper gives to 110 layers only. Minutes on a CPU at the default 16 px.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax import tree
from mmjax.data.pipeline import Pipeline
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.sources import ArraySource
from mmjax.evaluation.classification import ClassificationEvaluation
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.resnet.supervised import ResNetClassifier
from mmjax.training.checkpoint import load_params
from mmjax.training.classification import Classification
from mmjax.training.experiment import Evaluation, ExperimentConfig
from mmjax.training.loop import train
from mmjax.training.metrics import read_metrics
from mmjax.training.optimizer import Optimizer, sgd

TEST = 297
"""The last records, which other writers drew."""
MEAN, STD = 0.3053, 0.3762
"""The mean and standard deviation of all pixels in [0, 1]."""


def digits(size: int) -> tuple[ArraySource, ArraySource]:
    """(training, test) records: image float32 [size, size, 3], normalised, and label."""
    from sklearn.datasets import load_digits

    dataset: Any = load_digits()
    small = jnp.asarray(dataset.images[..., None] / 16, jnp.float32)
    images = np.asarray(jax.image.resize(small, (len(small), size, size, 1), "bilinear"))
    images = np.repeat((images - MEAN) / STD, 3, axis=-1).astype(np.float32)
    source = ArraySource(name="digits", image=images, label=dataset.target.astype(np.int32))
    return source.select(range(len(source) - TEST)), source.select(range(len(source) - TEST, len(source)))


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    """depth: 6n + 2 layers. skip: pad (option A), projection (option B) or none (plain). size: pixels of a side."""

    steps: int = 400
    batch_size: int = 64
    tensorboard: bool = False
    depth: int = 20
    skip: Literal["pad", "projection", "none"] = "pad"
    size: int = 16
    learning_rate: float = 0.1
    warmup: int = 20

    @property
    def network(self) -> ResNetConfig:
        return ResNetConfig.cifar(self.depth, self.skip)

    def method(self) -> Classification:
        return Classification(ResNetClassifier(self.network), classes=10)

    def optimizer(self) -> Optimizer:
        drops = {self.steps // 2: 0.1, self.steps * 3 // 4: 0.1}
        falling = optax.piecewise_constant_schedule(self.learning_rate, drops)
        return Optimizer(sgd(lambda step: falling(step) * jnp.minimum(1.0, (step + 1) / self.warmup), 0.9, 1e-4))

    def train_data(self) -> Pipeline:
        return Pipeline(
            digits(self.size)[0],
            self.batch_size,
            seed=self.seed,
            workers=self.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluations(self) -> tuple[Evaluation, ...]:
        """Accuracy with the running statistics, on all test digits at once."""
        images, labels = (np.asarray(digits(self.size)[1].columns[name]) for name in ("image", "label"))
        evaluation = ClassificationEvaluation(
            logits=self.method().predict, images=images, labels=labels, batch_size=TEST
        )
        return (evaluation,)

    def model(self) -> tuple[str, ResNetConfig]:
        return "resnet", self.network

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        normal = ImagePreprocessing(
            (self.size, self.size), None, "round", "bilinear", (MEAN, MEAN, MEAN), (STD, STD, STD)
        )
        return {"preprocess": dataclasses.asdict(normal)}


def gradient_norms(config: Config, params: Any, carry: Any, batch: Any) -> list[float]:
    """The norm of the loss's gradient for every 3x3 kernel, from the stem to the last."""
    method = config.method()

    def loss(params: Any) -> Any:
        return method.loss(params, carry, batch, jax.random.key(0), jnp.int32(0))[0]

    flat = tree.flatten(jax.jit(jax.grad(loss))(params))
    names = ["stem_conv/kernel"]
    for stage, count in enumerate(config.network.layers, 1):
        names += [f"stage{stage}_block{i}/conv{j}/kernel" for i in range(count) for j in (1, 2)]
    return [float(jnp.linalg.norm(flat[name])) for name in names]


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains one net (or resumes it) and measures its gradients before and after."""
    last = train(config, workdir, experiment_file=str(pathlib.Path(__file__).resolve()))
    columns = digits(config.size)[0].columns
    batch = {name: jnp.asarray(column[: config.batch_size]) for name, column in columns.items()}
    if "val/classification_top1" not in last:
        raise SystemExit(f"{workdir}: interrupted and saved; the same command resumes there")
    # Drawn from the run's seed, not the run's own draw: the law of the initial weights is what matters.
    params, carry = jax.jit(config.method().init)(jax.random.key(config.seed), batch)
    trained = load_params(workdir)
    lines = [line for line in read_metrics(workdir) if "train/loss" in line]
    return {
        "depth": config.depth,
        "skip": config.skip,
        "step": [line["step"] for line in lines],
        "loss": [line["train/loss"] for line in lines],
        "test_accuracy": last["val/classification_top1"] / 100,
        "gradient_at_start": gradient_norms(config, params, carry, batch),
        "gradient_at_end": gradient_norms(config, trained["params"], carry.replace(stats=trained["stats"]), batch),
    }


def plot(runs: list[dict[str, Any]], file: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    colors = {depth: f"C{i}" for i, depth in enumerate(sorted({result["depth"] for result in runs}))}
    for result in runs:
        plain = result["skip"] == "none"
        name = f"{'plain' if plain else 'ResNet'}-{result['depth']}"
        style = {"color": colors[result["depth"]], "linestyle": "--" if plain else "-", "label": name}
        axes[0].plot(result["step"], result["loss"], **style)
        for axis, when in zip(axes[1:], ("start", "end")):
            norms = result[f"gradient_at_{when}"]
            axis.plot(np.linspace(0, 1, len(norms)), norms, **style)
    for axis, title, label in zip(
        axes,
        ("Training loss", "Gradient of each kernel, at initialisation", "The same, after training"),
        ("step", "layer (0 = first)", "layer (0 = first)"),
    ):
        axis.set(title=title, xlabel=label, yscale="log")
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--depths", default="20,56,110")
    parser.add_argument("--steps", type=int, default=Config.steps)
    parser.add_argument("--batch-size", type=int, default=Config.batch_size)
    parser.add_argument("--size", type=int, default=Config.size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    options = parser.parse_args()
    runs = []
    for depth in map(int, options.depths.split(",")):
        for skip in ("pad", "none"):
            config = Config(
                seed=options.seed,
                steps=options.steps,
                batch_size=options.batch_size,
                size=options.size,
                depth=depth,
                skip=skip,  # type: ignore[arg-type]
                warmup=max(options.steps // 20, 1),
                log_every=max(options.steps // 40, 1),
            )
            runs.append(run(config, options.workdir / f"{'plain' if skip == 'none' else 'resnet'}{depth}"))
            (options.workdir / "depth.json").write_text(json.dumps(runs, indent=1) + "\n")
            plot(runs, options.workdir / "depth.png")
            new = runs[-1]
            start = new["gradient_at_start"]
            print(
                f"depth {depth:4} skip {skip:5} last loss {new['loss'][-1]:.4f}  test accuracy "
                f"{new['test_accuracy']:.3f}  first / last kernel's gradient at start {start[0] / start[-1]:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
