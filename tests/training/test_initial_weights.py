"""Runs that start from weights: every kind of source, both BatchNorm sets, every method, resuming, and mistakes."""

import functools
import json
import logging
import pathlib
import shutil
import sys
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import REPOSITORY
from make_torch_goldens import images
from safetensors.numpy import load_file, save_file
from small import SmallRun, largest_difference, small_config
from torch_libraries import features_of, library, with_drawn_weights

from hexa_jax import export, main
from hexa_jax.evals.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, load_backbone
from hexa_jax.methods import METHODS
from hexa_jax.models.heads import Network, ProjectionHead
from hexa_jax.models.norm import (
    ADVERSARIAL,
    CLEAN,
    EVALUATION,
    NormMode,
    fill_both_sets,
    follow_clean,
    stats_collection,
)
from hexa_jax.models.pretrained import LIBRARIES, is_library_name, load_pretrained
from hexa_jax.models.resnet import make_resnet
from hexa_jax.models.weights import WeightsError, fingerprint, to_torchvision
from hexa_jax.parallel import processes
from hexa_jax.storage.workdir import INIT_RECORD as RECORD
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.initial_weights import described, read_initial_weights
from hexa_jax.training.loop import pretrain

TOLERANCE = 1e-4  # of the largest value
SIDE = 64


# ---- sources ---------------------------------------------------------------------------------------------------------


@functools.cache
def a_resnet18():
    """A network to pre-train, with a head and two BatchNorm sets, and its variables' shapes."""
    network = Network(
        make_resnet("resnet18", auxiliary_norm=True), ProjectionHead(6, 5, True, auxiliary_norm=True), IMAGENET_MEAN, IMAGENET_STD
    )  # fmt: skip
    crops = (jnp.zeros((1, 1, 32, 32, 3)),)
    return network, jax.eval_shape(lambda: network.init(jax.random.key(0), crops, EVALUATION))


@functools.partial(jax.jit, static_argnums=(0, 3))
def backbone_features(resnet, variables, x, mode):
    """Pooled features [N, F] of normalised images."""
    return resnet.apply({name: tree["backbone"] for name, tree in variables.items()}, x, mode)


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def config_with(name):
    return small_config(
        precision="float32",
        **{"model.init": str(name), "model.backbone": "resnet18", "model.base_channels": 64, "model.stem": "imagenet"},
    )


@pytest.fixture(scope="module")
def torchvision_resnet():
    """torchvision's own network without its classifier, its arrays, and its features of some images."""
    models = library("torchvision").models
    with_classifier = with_drawn_weights(models.resnet18())
    state = with_classifier.state_dict()
    with_classifier.fc = __import__("torch").nn.Identity()
    return state, features_of(with_classifier, images(SIDE, SIDE))


@pytest.fixture(scope="module")
def huggingface_folder(tmp_path_factory):
    """A repository's files as transformers writes them, and the network's features of some images."""
    transformers = library("transformers")
    library("torchvision")  # transformers would try to import it
    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    network = with_drawn_weights(transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)))
    folder = tmp_path_factory.mktemp("huggingface")
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return folder, features_of(lambda x: network.resnet(x).pooler_output.flatten(1), images(SIDE, SIDE))


def saved_by_torchvision(kind, request, folder, monkeypatch):
    """What `model.init` names, of a kind of source, and the features that it must give."""
    state, expected = request.getfixturevalue("torchvision_resnet")
    arrays = {name: value.numpy() for name, value in state.items()}
    if kind == "safetensors":
        save_file(arrays, folder / "weights.safetensors")
        return folder / "weights.safetensors", expected
    if kind == "npz":
        np.savez(folder / "weights.npz", **arrays)
        return folder / "weights.npz", expected
    if kind == "pth":
        import torch

        torch.save({"state_dict": state}, folder / "weights.pth")
        return folder / "weights.pth", expected
    if kind == "timm folder":
        library("timm")
        save_file(arrays, folder / "weights.safetensors")
        export.export(load_backbone(str(folder / "weights.safetensors")), "timm", folder / "timm")
        return f"timm:local-dir:{folder / 'timm'}", expected
    if kind == "timm":
        library("timm")
        monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
        return "timm:resnet18.a1_in1k", expected
    assert kind == "torchvision"
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(state))
    return "torchvision:resnet18:IMAGENET1K_V1", expected


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pth", "timm", "timm folder", "torchvision"])
def test_libraries_and_files_give_the_features_of_their_own_network(kind, request, tmp_path, monkeypatch):
    name, expected = saved_by_torchvision(kind, request, tmp_path, monkeypatch)
    check_source(name, expected)


@pytest.mark.parametrize("kind", ["folder", "pytorch_model.bin", "hub", "file"])
def test_huggingface_gives_the_features_of_its_own_network(kind, huggingface_folder, tmp_path, monkeypatch):
    folder, expected = huggingface_folder
    name = {"hub": "hf:someone/resnet@main", "file": folder / "model.safetensors"}.get(kind, f"hf:{folder}")
    if kind == "pytorch_model.bin":
        import torch

        arrays = load_file(folder / "model.safetensors")
        torch.save({n: torch.from_numpy(value) for n, value in arrays.items()}, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        name = f"hf:{tmp_path}"
    if kind == "hub":
        asked = []

        def download(repository, file, revision):
            asked.append((repository, file, revision))
            return str(folder / file)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        assert load_pretrained(name)[1:] == ((0.5,) * 3, (0.25,) * 3)
        files = ("config.json", "model.safetensors", "preprocessor_config.json")
        assert asked == [("someone/resnet", file, "main") for file in files]
    check_source(name, expected)


def check_source(name, expected):
    """A network that starts from weights gives the features that their own library gives; both BatchNorm sets are equal."""
    network, variables = a_resnet18()
    weights = read_initial_weights(config_with(name), network, variables)
    assert weights.record["name"] == str(name) and weights.record["architecture"] == "resnet18"
    assert weights.record["step"] is None and len(weights.record["sha256"]) == 64
    filled = fill_both_sets(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables), weights.variables)
    assert_close(backbone_features(network.backbone, filled, images(SIDE, SIDE), NormMode(CLEAN)), expected)
    assert largest_difference(filled["params"], follow_clean(filled["params"])) == 0
    sets = [filled[stats_collection(branch)]["backbone"] for branch in (CLEAN, ADVERSARIAL)]
    assert largest_difference(*sets) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(filled["params"]["head"]))


def test_the_hash_is_of_the_weights_and_not_of_their_file():
    backbone, _ = zeros()
    arrays = to_torchvision(backbone.variables)
    wrapped = {f"module.encoder_q.{name}": value for name, value in arrays.items()} | {"module.queue": np.zeros(3)}
    without_counters = {name: value for name, value in arrays.items() if "num_batches" not in name}
    assert len({fingerprint(each) for each in (arrays, wrapped, without_counters)}) == 1
    changed = arrays | {"bn1.running_mean": arrays["bn1.running_mean"] + 1}
    assert fingerprint(changed) != fingerprint(arrays)


def test_pixels_of_another_kind_are_told(tmp_path, caplog):
    network, variables = a_resnet18()
    backbone, _ = zeros("resnet18", "imagenet", 64)
    own = backbone._replace(network=network.clone(pixel_mean=(0.5, 0.5, 0.5)))
    for given, warned in ((backbone, False), (own, True)):
        export.export(given, "torchvision", tmp_path / "weights.safetensors")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            read_initial_weights(config_with(tmp_path / "weights.safetensors"), network, variables)
        assert ["mean (0.5, 0.5, 0.5)" in record.getMessage() for record in caplog.records] == [True] * warned


# ---- methods ---------------------------------------------------------------------------------------------------------


@functools.cache
def initial_backbone():
    """Variables of a small network that nothing else draws: statistics and scales are no zeros and ones."""
    rng = np.random.default_rng(0)
    random = load_backbone("random", seed=7, backbone="resnet6", stem="cifar", base_channels=4).variables
    return jax.tree.map(lambda leaf: (leaf + rng.uniform(0.1, 0.3, leaf.shape)).astype(np.float32), random)


def states(config):
    """The trainer of a run, its random first state, and the one that starts from `initial_backbone`."""
    trainer = make_trainer(config, config.data.shapes_count, jax.devices()[:1], num_classes=10)
    both = jax.jit(lambda seed, weights: (trainer.init_state(seed), trainer.init_state(seed, weights)))
    return trainer, *both(np.uint32(config.seed), initial_backbone())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_the_weights(method):
    trainer, drawn, started = states(small_config(method, precision="float32"))
    backbone = trainer.objective.network.backbone
    params = {"params": started.params["network"], **started.batch_stats}
    x = images(8, 8)
    expected = backbone_features(backbone.clone(auxiliary_norm=False), initial_backbone(), x, NormMode())
    for branch in (CLEAN, ADVERSARIAL):
        assert_close(backbone_features(backbone, params, x, NormMode(branch)), expected)
    assert largest_difference(drawn.params["network"]["backbone"], started.params["network"]["backbone"]) > 0.1
    # Everything else is what the seed draws.
    others = [{n: tree for n, tree in s.params["network"].items() if n != "backbone"} for s in (drawn, started)]
    assert largest_difference(*others) == 0
    assert largest_difference(drawn.params["method"], started.params["method"]) == 0
    moving = {"moco": lambda s: s.key_params, "pcl": lambda s: s.moco.key_params, "byol": lambda s: s}
    if method in moving:  # the key encoder and the target network
        own = moving[method](started.method)
        assert largest_difference(own, {name: started.params["network"][name] for name in own}) == 0


def test_the_first_pass_fills_the_bank_by_the_weights():
    run = SmallRun(small_config("deepcluster", precision="float32"))
    batch, banks = next(run.batches()), []
    drawn, started = jax.device_get(states(small_config("deepcluster", precision="float32"))[1:])
    by_hand = drawn._replace(params=started.params)  # outputs in training mode read no statistics
    with jax.set_mesh(run.trainer.mesh):
        for state in (by_hand, started, drawn):
            state = jax.device_put(state, run.trainer.state_sharding())
            banks.append(np.asarray(run.steps.observe(state, batch, None).method.bank.rows))
    np.testing.assert_array_equal(banks[0], banks[1])
    assert np.abs(banks[1] - banks[2]).max() > 0.01


def test_a_run_starts_from_a_file_and_resumes_without_it(tmp_path):
    weights, workdir = tmp_path / "weights.safetensors", tmp_path / "run"
    backbone = load_backbone("random", seed=7, backbone="resnet6", stem="cifar", base_channels=4)
    export.export(backbone._replace(variables=initial_backbone()), "torchvision", weights)
    settings = {"precision": "float32", "epochs": 2, "data.shapes_size": 16, "scheme": "std"}
    settings |= {"runtime.num_devices": 1, "runtime.check_memory": False, "knn.pixels": False}
    settings |= {"knn.resize": 8, "knn.crop": 8, "knn.neighbours": 3, "knn.train_limit": 40, "knn.test_limit": 20}
    config = small_config("moco", **settings, **{"model.init": str(weights)})
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json())
    results = pretrain(config, workdir)
    record = json.loads((workdir / RECORD).read_text())
    assert record == {
        "name": str(weights),
        "sha256": fingerprint(load_file(weights)),
        "architecture": "resnet6 with 4 channels and a cifar stem",
        "step": None,
    }
    page = (workdir / "report" / "index.html").read_text()
    assert record["sha256"] in page and "initial weights" in page and str(weights) in page
    accuracies = [results[f"{prefix}knn_accuracy"] for prefix in ("random_", "initial_", "")]
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["step"], first["knn_accuracy"]) == (0, accuracies[1])

    weights.unlink()
    (last,) = (workdir / "checkpoints").glob(f"step_{results['step']:08d}*")
    shutil.rmtree(last)
    assert pretrain(config, workdir) == results  # from the epoch before
    assert json.loads((workdir / RECORD).read_text()) == record

    # The run is itself something to start from.
    network, variables = small_network(config)
    following = read_initial_weights(with_init(config, workdir), network, variables)
    assert following.record["step"] == results["step"]
    saved = load_backbone(str(workdir)).variables
    assert largest_difference(following.variables, saved) == 0


def with_init(config, name):
    config = config.copy_and_resolve_references()
    config.model.init = str(name)
    return config


def small_network(config):
    """The network of a small config, and shapes of its variables."""
    trainer = make_trainer(config, config.data.shapes_count, jax.devices()[:1])
    shapes = trainer.state_shapes()
    return trainer.objective.network, {"params": shapes.params["network"], **shapes.batch_stats}


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, capsys):
    """Starts a run of a tiny network from weights, and returns the one line that it ends with."""
    handlers = logging.root.handlers[:]

    def call(name, *words):
        start = [f"--config={REPOSITORY}/configs/tiny.py:method=moco,scheme=std", f"--workdir={tmp_path}/refused"]
        code = main.main(["hexa", *start, f"--config.model.init={name}", *words])
        captured = capsys.readouterr()
        assert code == 2 and captured.err.startswith("hexa_jax: ") and not captured.out, captured
        assert len(captured.err.splitlines()) == 1
        assert not (tmp_path / "refused").exists()
        return captured.err.removeprefix("hexa_jax: ").strip()

    yield call
    logging.root.handlers[:] = handlers


def zeros(backbone="resnet10", stem="cifar", base_channels=4, **settings):
    """A backbone whose weights are zeros, and a network's variables of the same architecture."""
    network = Network(
        make_resnet(backbone, base_channels, stem=stem, **settings), None, IMAGENET_MEAN, IMAGENET_STD, normalize=False
    )
    crops = (jnp.zeros((1, 1, 32, 32, 3)),)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), crops, EVALUATION))
    return Backbone(network, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), -1, None), shapes


IN_WORDS = "resnet10 with 4 channels and a cifar stem"


@pytest.mark.parametrize(
    "found, wanted, line",
    [
        ({}, {"backbone": "resnet18"}, f"layer1.1.bn1 is missing: {IN_WORDS} weights for a resnet18 with 4 channels and a "),
        ({"backbone": "resnet18"}, {}, "layer1.1.bn1 is left over: resnet18 with 4 channels and a cifar stem weights for a "),
        ({"backbone": "resnet34"}, {"backbone": "resnet50"}, "layer1.0.bn3 is missing: "),
        ({"backbone": "resnet50"}, {"backbone": "resnet34"}, "layer1.0.bn3 is left over: "),
        ({"base_channels": 8}, {}, f"shape (8,), not (4,): resnet10 with 8 channels and a cifar stem weights for a {IN_WORDS}?"),
        ({"stem": "imagenet"}, {}, "conv1.weight has shape (4, 3, 7, 7), not (4, 3, 3, 3): resnet10 with 4 channels weights "),
        ({"stem": "small"}, {}, "the stem is small, not cifar: "),
    ],
)  # fmt: skip
def test_another_architecture_is_one_line(found, wanted, line, tmp_path):
    path = tmp_path / "weights.safetensors"
    export.export(zeros(**found)[0], "torchvision", path)
    backbone, shapes = zeros(**wanted, auxiliary_norm=True)
    with pytest.raises(WeightsError) as error:
        read_initial_weights(config_with(path), backbone.network, shapes)
    message = str(error.value)
    assert message.startswith(f"config.model.init={path}: ") and line in message and "\n" not in message


def test_a_run_is_refused_before_anything_is_compiled(tmp_path, refused):
    export.export(zeros()[0], "torchvision", tmp_path / "weights.safetensors")
    assert "layer1.1.bn1 is missing: " in refused(tmp_path / "weights.safetensors", "--config.model.backbone=resnet18")


def test_a_stem_that_no_array_tells_is_taken_for_the_wanted_one(tmp_path):
    """cifar and small differ in a stride alone; a file of somebody else does not say which it was."""
    backbone, shapes = zeros(stem="small")
    save_file(to_torchvision(backbone.variables), tmp_path / "weights.safetensors")
    for stem in ("cifar", "small"):
        wanted = zeros(stem=stem)[0].network
        weights = read_initial_weights(config_with(tmp_path / "weights.safetensors"), wanted, shapes)
        assert weights.record["sha256"] == fingerprint(to_torchvision(backbone.variables))


@pytest.mark.parametrize(
    "name, line",
    [
        (
            "random",
            "config.model.init=random is no weights: leave it empty to start from random ones, or use a workdir",
        ),
        ("nowhere", "checkpoint 'nowhere' is neither a file nor the workdir of a run"),
        ("timm:", "timm: names no weights: timm:resnet50.a1_in1k, "),
        ("torchvision:resnext50_32x4d", "is a resnext50_32x4d: only resnet18, resnet34, resnet50, resnet101 compute"),
    ],
)
def test_names_that_are_no_weights(name, line, refused):
    if name.startswith("torchvision:r"):
        library("torchvision")
    assert line in refused(name)


@pytest.mark.parametrize("kind, module", [("timm", "timm"), ("torchvision", "torchvision"), ("hf", "huggingface_hub")])
def test_a_missing_library_says_what_to_install(kind, module, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails, even where it is
    assert refused(f"{kind}:resnet18") == f"{kind}:resnet18 needs {module}: pip install {module}"


def test_networks_that_blur_are_refused(monkeypatch):
    """Their arrays are a ResNet's, and mean something else."""
    timm = library("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained=False))
    with pytest.raises(
        WeightsError, match=r"^timm:resnetblur18 is a resnetblur18: only resnet18, .* the same as ours$"
    ):
        load_pretrained("timm:resnetblur18")


def test_what_a_library_raises_is_one_line(monkeypatch):
    timm = library("timm")

    def fails(*_, **__):
        raise RuntimeError("Unknown model (resnet_18)\nsecond line")

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(
        WeightsError, match=r"^timm:resnet_18 cannot be loaded: Unknown model \(resnet_18\) second line$"
    ):
        load_pretrained("timm:resnet_18")


@pytest.mark.parametrize(
    "config, line",
    [
        ({"model_type": "vit"}, "is a vit: only ResNets of transformers or timm can be read"),
        ({}, "is a model of no known kind: "),
        (
            {"model_type": "resnet", "downsample_in_bottleneck": True},
            "has downsample_in_bottleneck=True in its config.json",
        ),
        ({"model_type": "resnet", "hidden_act": "gelu"}, "has hidden_act='gelu' in its config.json: only 'relu'"),
        ({"architecture": "resnetblur50"}, "is a resnetblur50: only resnet18"),
        ({"model_type": "resnet"}, "has neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_repositories_that_are_no_plain_resnet(config, line, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError) as error:
        load_pretrained(f"hf:{tmp_path}")
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_repository_that_cannot_be_reached_is_one_line(monkeypatch):
    library("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache\nand no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(
        WeightsError, match=r"^hf:someone/resnet cannot be loaded: Cannot find .* cache and no connection$"
    ):
        load_pretrained("hf:someone/resnet")


def test_processes_that_read_different_weights_stop(tmp_path, monkeypatch):
    """Each would otherwise go on with its own."""
    backbone, shapes = zeros()
    export.export(backbone, "torchvision", tmp_path / "weights.safetensors")
    config = config_with(tmp_path / "weights.safetensors")
    for other, refused in ((0, False), (1, True)):
        monkeypatch.setattr(
            processes, "gather", lambda mine, other=other: np.concatenate([mine, mine + np.uint8(other)])
        )
        with pytest.raises(WeightsError, match=r"is not the same for all processes$") if refused else nullcontext():
            read_initial_weights(config, backbone.network, shapes)


def test_names_of_libraries_and_of_files():
    assert all(is_library_name(f"{name}:x") for name in LIBRARIES)
    assert not any(
        map(is_library_name, ("timm", "runs/timm", "gs://bucket/timm", "C:weights.npz", str(pathlib.Path("/hf"))))
    )


def test_architectures_in_words():
    assert described(make_resnet("resnet50")) == "resnet50"
    assert described(make_resnet("resnet18", 16, stem="small")) == "resnet18 with 16 channels and a small stem"
    assert described(make_resnet("resnet50w2")) == "resnet50 with 128 channels"
