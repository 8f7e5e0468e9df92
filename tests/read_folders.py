"""What an installed transformers reads of Hugging Face folders, as JSON: a program for an interpreter of any version.

python read_folders.py JOB, where JOB is a JSON file {"folders": [...], "texts": [...], "save": FOLDER or null}: with
"save", each folder is also written anew, by its name, as this version writes it.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def read(folder: Path, texts: list[str], target: Path | None) -> dict:
    facts: dict = {"version": transformers.__version__}
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        facts["ids"] = [tokenizer(text)["input_ids"] for text in texts]
        facts["plain ids"] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        facts["decoded"] = [tokenizer.decode(row, skip_special_tokens=True) for row in facts["ids"]]
        facts["special"] = {role: getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": "w1"}]
            facts["chat"] = tokenizer.apply_chat_template(chat, tokenize=False)
        if target is not None:
            tokenizer.save_pretrained(target)
    if (folder / "model.safetensors").is_file():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        facts["dtype"] = str(model.dtype)
        ids = torch.arange(96)[None] * 37 % model.config.vocab_size
        with torch.no_grad():
            log_probs = model.float()(ids).logits[0, :-1].log_softmax(-1)
        facts["log_probs"] = log_probs.gather(1, ids[0, 1:, None])[:, 0].tolist()
        facts["stops"] = model.generation_config.eos_token_id
        if target is not None:
            model.save_pretrained(target)
    elif target is not None:
        AutoConfig.from_pretrained(folder).save_pretrained(target)
    if target is not None and (folder / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(folder).save_pretrained(target)
    return facts


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    job = json.loads(Path(sys.argv[1]).read_text())
    result = {}
    for name in job["folders"]:
        folder = Path(name)
        target = Path(job["save"]) / folder.name if job["save"] else None
        try:
            result[folder.name] = read(folder, job["texts"], target)
        except Exception as error:  # a folder that does not load is a result
            result[folder.name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
