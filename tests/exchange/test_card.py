"""The model card of an exported pipeline."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from diffusion.storage.files import sha256
from flows.__main__ import main
from tests.exchange import models


def test_a_card_lies_beside_the_pipeline_and_is_replaced_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = models.settings()
    models.save(Path("models/ddpm"), chosen)
    Path("params.yaml").write_text(chosen.model_dump_json())
    assert main(["export-diffusers", "exported"]) == 0
    Path("exported/README.md").write_text("former")
    assert main(["export-diffusers", "exported", "--force"]) == 0
    card = ModelCard.load("exported/README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    digest = sha256(Path("exported/unet/diffusion_pytorch_model.safetensors"))
    assert f"| `unet/diffusion_pytorch_model.safetensors` | `{digest}` |" in card.text
    assert "from diffusers import DDPMPipeline\n" in card.text
    assert "these weights were not evaluated" in card.text
