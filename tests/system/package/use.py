"""Do one thing that a user of an installed kdfast does: `python use.py loss`. install.py runs this in an environment
that has the wheel alone, and in a folder outside the checkout."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

HELPERS = Path(__file__).parents[2] / "helpers"
CONFIG = """
teacher_model_name_or_path: teacher
student_config: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 64}
train_file: text.txt
max_length: 32
output_dir: out
max_steps: 4
learning_rate: 5e-3
per_device_train_batch_size: 2
save_steps: 2
use_cpu: true
disable_tqdm: true
"""


def kdfast(*arguments, code=0):
    done = subprocess.run([sys.executable, "-m", "kdfast", *arguments], capture_output=True, text=True)
    assert done.returncode == code, f"kdfast {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr}"
    return done.stdout + done.stderr


def refusal(function):
    try:
        function()
    except (ValueError, ImportError) as error:
        return str(error)
    return "no error"


def problem(dtype=torch.float32):
    """Student, projected teacher, labels: N = 24, V = 501, Hs = 16, Ht = 24."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*size, generator=generator) for size in ((24, 16), (501, 16), (24, 24), (16, 24))]
    labels = torch.randint(0, 501, (24,), generator=generator)
    hidden, weight, teacher, projector = (tensor.to(dtype) for tensor in tensors)
    return [hidden.requires_grad_(), weight.requires_grad_(), teacher, projector.requires_grad_()], labels


def value_and_gradients(function, engine):
    (hidden, weight, teacher, projector), labels = problem()
    loss = function(hidden, weight, teacher, projector, labels, engine)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight, projector))]


def fused(hidden, weight, teacher, projector, labels, engine):
    from kdfast import Head, Projected, fused_kd_loss

    return fused_kd_loss(Head(hidden, weight), Projected(teacher, projector), labels, ce_weight=1.0, engine=engine)


def loss():
    """Value and gradients, the engine's and a compiled graph's, against the reference."""
    expected = value_and_gradients(fused, "reference")
    compiled = torch.compile(fused, fullgraph=True)
    for name, function in (("torch", fused), ("auto", fused), ("auto, compiled", compiled)):
        found = value_and_gradients(function, name.split(",")[0])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def triton():
    """An explicit engine is there or says what is missing; run with TRITON_INTERPRET=1."""
    if importlib.util.find_spec("triton") is not None:
        for engine in ("triton_chunked", "triton_tiled"):
            torch.testing.assert_close(value_and_gradients(fused, engine), value_and_gradients(fused, "reference"))
        return
    told = refusal(lambda: value_and_gradients(fused, "triton_chunked"))
    assert "'triton_chunked' needs the package triton, which is not installed" in told, told


def command():
    """--help, --version, doctor and plan need no training part; doctor tells our kernels/ from another's."""
    import kdfast as package

    assert kdfast("--help").startswith("usage: kdfast ")
    assert kdfast("--version").strip() == f"kdfast {package.__version__}"
    told = kdfast("doctor")
    assert str(Path(package.__file__).parent / "kernels") in told, told
    assert "SHADOWED" not in told
    sizes = ("--vocab", "50257", "--student-width", "768", "--kind", "head", "--memory", "80GB")
    assert "of 74.51 GiB" in kdfast("plan", *sizes)


def no_training():
    """Without the extra everything that needs it says how to get it."""
    told = kdfast("distill", "config.yaml", code=2)
    assert "pip install 'kdfast[train]'" in told, told
    import kdfast as package

    told = refusal(lambda: package.KDTrainer)
    assert "pip install 'kdfast[train]'" in told, told


def training():
    """`kdfast distill` from text to a student that transformers loads, in the current folder; then the model alone."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    sys.path.insert(0, str(HELPERS))
    from byte_tokenizer import make_tokenizer

    from kdfast import DistillationModel

    config = GPT2Config(
        n_layer=1, n_embd=32, n_head=2, n_positions=64, vocab_size=257, bos_token_id=256, eos_token_id=256
    )
    torch.manual_seed(0)
    teacher = GPT2LMHeadModel(config)
    teacher.save_pretrained("teacher")
    make_tokenizer().save_pretrained("teacher")
    Path("text.txt").write_text("".join(f"{i}: {i * i} is the square of {i}\n" for i in range(100)))
    Path("config.yaml").write_text(CONFIG)
    told = kdfast("distill", "config.yaml", "--overwrite_output_dir", "true")
    assert Path("out/model.safetensors").exists(), told
    student = AutoModelForCausalLM.from_pretrained("out")

    ids = torch.randint(0, 257, (2, 16))
    found = DistillationModel(student, teacher, recipe="teacher_head")(input_ids=ids, labels=ids)
    found.loss.backward()
    assert torch.isfinite(found.loss)


def readme():
    """README's code, with the hidden code around it."""
    sys.path.insert(0, str(HELPERS))
    import documents

    code = [block.text for block in documents.blocks("README.md") if block.language in ("run", "python")]
    assert "fused_kd_loss" in "".join(code)
    exec("\n".join(code), {})


def lora():
    """A LoRA student of the teacher that `training` saved, then merged into a whole model."""
    from transformers import AutoModelForCausalLM

    settings = [line for line in CONFIG.splitlines() if not line.startswith(("student_config", "output_dir"))]
    more = ["model_name_or_path: teacher", "output_dir: lora", "use_peft: true", "lora_target_modules: [c_attn]"]
    Path("lora.yaml").write_text("\n".join([*settings, *more]))
    kdfast("distill", "lora.yaml", "--overwrite_output_dir", "true")
    assert Path("lora/adapter_model.safetensors").exists()
    kdfast("merge", "lora", "--output", "merged")
    assert AutoModelForCausalLM.from_pretrained("merged").config.vocab_size == 257


def typed():
    """A user's type checker knows our types (py.typed), including those that load when first used."""
    Path("user.py").write_text(
        "import torch\n"
        "from kdfast import Head, KDMetrics, KDTrainer, Projected, fused_kd_loss\n"
        "head = Head(torch.randn(3, 4), torch.randn(5, 4))\n"
        "loss = fused_kd_loss(head, Projected(torch.randn(3, 4)))\n"
        "loss.backward()\n"
        "def kd(metrics: KDMetrics): reveal_type(metrics.kd)\n"
        "reveal_type(KDTrainer.train)\n"
        "fused_kd_loss(head, None, reduction='average')\n"
    )
    done = subprocess.run([sys.executable, "-m", "mypy", "user.py"], capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert "torch._tensor.Tensor" in told[0], done.stdout + done.stderr
    assert "kdfast.training.trainer.KDTrainer" in told[1], done.stdout
    assert told[2].startswith('user.py:8: error: Argument "reduction" to "fused_kd_loss"'), done.stdout
    assert told[-1].startswith("Found 1 error"), done.stdout


if __name__ == "__main__":
    globals()[sys.argv[1]]()
