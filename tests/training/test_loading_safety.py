"""Nothing that is read runs code: pickles, custom code of model repositories, YAML.

Every payload creates a folder when it is called; the first test shows that it works where loading is not safe.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil

import fault_runs
import pytest
import torch
import torch.distributed.checkpoint
import transformers

from kdfast.cli.arguments import parse
from kdfast.cli.errors import UserError
from kdfast.training import DistillationModel, load_student, load_teacher
from kdfast.training.durable import checkpoint, checksums, safe_load
from kdfast.training.durable.errors import DamagedCheckpointError


class Payload:
    def __init__(self, creates):
        self.creates = creates

    def __reduce__(self):
        return os.mkdir, (str(self.creates),)


@pytest.fixture
def ran(tmp_path):
    """The folder that a payload creates."""
    return tmp_path / "payload-ran"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    fault_runs.train(fault_runs.make(folder, max_steps=2))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished / "run/checkpoint-2", tmp_path / "run/checkpoint-2")


def test_the_payload_works(ran):
    torch.save({"state": Payload(ran)}, ran.with_suffix(".pt"))
    torch.load(ran.with_suffix(".pt"), weights_only=False)
    assert ran.exists()


def plant(path, ran, how):
    if how == "torch.save":
        torch.save({"state": Payload(ran)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(ran), protocol=2))


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_named_and_not_run(folder, ran, name, how):
    plant(folder / name, ran, how)
    checksums.write(folder)  # whoever plants it can do that too
    with pytest.raises(DamagedCheckpointError, match=f"cannot be gone on from: {name} ") as caught:
        fault_runs.make(folder.parent.parent, max_steps=4).train(resume_from_checkpoint=str(folder))
    if how == "torch.save":
        assert f"{name} would run posix.mkdir when read" in str(caught.value)
        assert "weights_only" not in str(caught.value), "torch's advice is to turn the protection off"
    assert not ran.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_of_a_sharded_optimizer(tmp_path, ran):
    """torch itself reads it with pickle.load."""
    state = {"exp_avg": torch.ones(2, 3, dtype=torch.bfloat16), "step": torch.tensor(3.0), "lr": 1e-3, "betas": [0.9]}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    assert safe_load.find_refused(tmp_path) is None
    through_a_known_module = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08os.mkdir\x93."
    for content, name in ((through_a_known_module, "os.mkdir"), (pickle.dumps(Payload(ran)), "posix.mkdir")):
        (tmp_path / "optimizer_0/.metadata").write_bytes(content)
        assert f"{name} when read; expected tensors" in safe_load.find_refused(tmp_path)
        assert not ran.exists()
    with pytest.raises(AttributeError):
        torch.distributed.checkpoint.FileSystemReader(tmp_path / "optimizer_0").read_metadata()
    assert ran.exists()


@pytest.fixture
def sharded(tmp_path):
    """A sharded optimizer's folder, with items that are no tensors."""
    state = {"exp_avg": torch.ones(2, 3), "lr": 1e-3, "betas": [0.9]}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    assert safe_load.find_refused(tmp_path) is None
    return tmp_path / "optimizer_0"


def load_sharded(folder):
    """As torch does by default, and accelerate for a run."""
    state = {"exp_avg": torch.zeros(2, 3), "lr": 0.0, "betas": [0.0]}
    torch.distributed.checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    return state


def point_at(folder, item, metadata=".metadata", **place):
    found = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata()
    key = next(key for key in found.storage_data if key.fqn == item)
    found.storage_data[key] = dataclasses.replace(found.storage_data[key], **place)
    (folder / ".metadata").unlink()
    (folder / metadata).write_bytes(pickle.dumps(found))


@pytest.mark.parametrize("metadata", [".metadata", "__0.metadata"])  # the second where there is no first
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_item_of_a_sharded_optimizer(sharded, ran, metadata):
    (file,) = sharded.glob("*.distcp")
    payload = io.BytesIO()
    torch.save(Payload(ran), payload)
    start = file.stat().st_size
    file.write_bytes(file.read_bytes() + payload.getvalue())
    assert safe_load.find_refused(sharded) is None, "nothing points at it"
    point_at(sharded, "lr", metadata, offset=start, length=len(payload.getvalue()))
    assert safe_load.find_refused(sharded.parent) == (
        f"{metadata} would run posix.mkdir when read; expected tensors, numbers and containers alone"
    )
    assert not ran.exists()
    load_sharded(sharded)
    assert ran.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_nor_behind_a_link_to_another_folder(sharded):
    (sharded.parent / "checkpoint-2").mkdir()
    (sharded.parent / "checkpoint-2/optimizer_0").symlink_to(sharded)
    found = safe_load.find_refused(sharded.parent / "checkpoint-2")
    assert found == "optimizer_0 is a link to another folder, where nothing is looked at"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_optimizer_stays_in_its_folder(sharded):
    (file,) = sharded.glob("*.distcp")
    file.rename(sharded.parent / "elsewhere")
    for item in ("lr", "exp_avg"):
        point_at(sharded, item, relative_path="../elsewhere")
        assert "'../elsewhere', expected a plain part of a file beside it" in safe_load.find_refused(sharded)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nor_by_what_trainer_loads_itself(folder, ran, name, monkeypatch):
    plant(folder / name, ran, "torch.save")
    checksums.write(folder)
    monkeypatch.setattr(safe_load, "find_refused", lambda folder: None)
    with pytest.raises(DamagedCheckpointError, match="cannot be loaded: UnpicklingError: it would run") as raised:
        fault_runs.make(folder.parent.parent, max_steps=4).train(resume_from_checkpoint=str(folder))
    assert "weights_only" not in str(raised.value), "torch's advice, to turn that off"
    assert not ran.exists()


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_pickled_weights_in_a_checkpoint_are_not_even_looked_at(tiny, tmp_path, ran, how):
    model = DistillationModel(tiny(), recipe="lm_only")
    checkpoint.save_models(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    plant(tmp_path / "pytorch_model.bin", ran, how)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        checkpoint.load_models(tmp_path, model)
    assert not ran.exists()


@pytest.mark.parametrize("load", [load_student, load_teacher])
@pytest.mark.parametrize("how", ["torch.save", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_weights_of_a_model(tiny, tmp_path, ran, load, how):
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    plant(tmp_path / "model/pytorch_model.bin", ran, how)
    with pytest.raises(ValueError, match=r"its weights file would run posix\.mkdir when read"):
        load(tmp_path / "model")
    assert not ran.exists()


def test_weights_that_are_cut_short(tiny, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    fault_runs.damage(tmp_path / "model/model.safetensors", "cut")
    with pytest.raises(ValueError, match=r"its weights file cannot be read: .*download or copy it again"):
        load_teacher(tmp_path / "model")


def bring_code(folder, ran, **auto_map):
    """A repository with a model type of its own, whose code is in evil.py."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    for name in ("config.json", "tokenizer_config.json"):
        if (path := folder / name).exists():
            path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map, "model_type": "evil"}))


@pytest.mark.parametrize("load", [load_student, load_teacher])
def test_code_of_a_repository_is_not_run(tiny, tmp_path, ran, load, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks where it was not told
    tiny().save_pretrained(tmp_path / "model")
    bring_code(tmp_path / "model", ran, AutoConfig="evil.Config", AutoModelForCausalLM="evil.Model")
    with pytest.raises(ValueError, match="contains custom code"):
        load(tmp_path / "model")
    assert not ran.exists()
    with pytest.raises(AttributeError):  # that it would have, had it been asked to
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert ran.exists()


def test_nor_that_of_a_configuration_or_tokenizer(tiny, tmp_path, ran, monkeypatch):
    from byte_tokenizer import make_tokenizer

    from kdfast.cli.arguments import ModelArguments
    from kdfast.cli.data import load_tokenizer

    monkeypatch.setattr("builtins.input", lambda *_: "y")
    make_tokenizer().save_pretrained(tmp_path / "model")
    tiny().config.save_pretrained(tmp_path / "model")
    bring_code(tmp_path / "model", ran, AutoConfig="evil.Config", AutoTokenizer=["evil.Tokenizer", None])
    with pytest.raises(ValueError, match="custom code"):
        load_student(student_config=tmp_path / "model")
    with contextlib.suppress(ValueError):  # another tokenizer may do
        load_tokenizer(ModelArguments(tokenizer_name=str(tmp_path / "model")))
    assert not ran.exists()


def test_yaml_makes_no_objects(tmp_path, ran):
    (tmp_path / "config.yaml").write_text(f"output_dir: !!python/object/apply:pathlib.Path.touch [{ran}]\n")
    with pytest.raises(UserError, match="not valid YAML: could not determine a constructor for the tag"):
        parse(str(tmp_path / "config.yaml"), [])
    assert not ran.exists()
