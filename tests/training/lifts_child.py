"""Run by test_lift.py in new processes: the device count is fixed before jax starts.

lifts_child.py OUT LIFTS [PROCESS COUNT PORT]
"""

import json
import sys

import jax
import numpy as np


def main() -> None:
    out, lifts, *cluster = sys.argv[1:]
    if cluster:
        index, count, port = map(int, cluster)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", count, index)
    import toy

    from mmjax import tree
    from mmjax.training.checkpoint_format import state_leaves
    from mmjax.training.lift import MeshConfig, create_lift, gather_json

    rules = (("**/head/kernel", ("tensor", None)),)
    meshes = {
        "mesh": MeshConfig(),
        "cut": MeshConfig(data=2, fsdp=2, tensor=2, rules=rules, min_size=8),
        "fsdp": MeshConfig(data=1, fsdp=-1, min_size=8),
    }
    results = {}
    for name in lifts.split(","):
        lift = create_lift("mesh" if name in meshes else name, toy.step, meshes.get(name))
        state, data, losses = lift.place(toy.init()), toy.Data(16), []
        for _ in range(5):
            batch = next(data)
            share = 16 // jax.process_count()
            begin = jax.process_index() * share
            shard = {key: leaf[begin : begin + share] for key, leaf in batch.items()}
            state, metrics = lift.step(state, lift.place_batch(shard))
            losses.append(lift.fetch_metrics(metrics)["loss"])
        cut = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
        host = lift.fetch(state)
        again = lift.fetch(lift.place(host))
        hashes = gather_json({"position": jax.process_index(), "hash": tree.tree_hash(host)})
        results[name] = {
            "losses": losses,
            "compiles": lift.compiles,
            "cut": cut,
            "same_after_placing": tree.tree_hash(again) == tree.tree_hash(host),
            "hashes": hashes,
            "leaves": {
                key: np.asarray(leaf, np.float64).ravel().tolist()
                for key, leaf in state_leaves(host).items()
                if key != "rng"
            },
        }
    if jax.process_index() == 0:
        with open(out, "w") as file:
            json.dump(results, file)


main()
