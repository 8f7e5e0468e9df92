"""Files in the forms of SQuAD, HotpotQA, LongBench and MMLU, and a tokenizer that loses nothing."""

import json
import random

from answering import TEMPLATE, write_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMES = "Ada Ben Cleo Dan Eve Finn Gus Hana Ian Jo Kai Lena Max Nora Olaf Pia Quin Rosa Sam Tess".split()
PLACES = "Rome Oslo Lima Cairo Delhi Quito Paris Tokyo Berlin Sofia Dakar Hanoi Minsk Riga Tunis Accra".split()


def byte_tokenizer(folder):
    """A tokenizer of single bytes, so that prompts can be read again, written to a folder."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<user>", "<assistant>", "<end>"]
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def byte_model(folder, seed=0, positions=4096):
    """A random model of `byte_tokenizer`'s ids."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_model(folder, seed, positions)
    tokenizer = byte_tokenizer(folder)
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size, config.eos_token_id, config.pad_token_id = len(tokenizer), tokenizer.eos_token_id, 0
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_squad(path, articles=6, paragraphs=8):
    """Each paragraph says where its person lives; two questions a paragraph, one of them impossible."""
    rng, data = random.Random(0), []
    for article in range(articles):
        of_article = []
        for number in range(paragraphs):
            person = f"{NAMES[(article * paragraphs + number) % len(NAMES)]} {article} {number}"
            place = PLACES[rng.randrange(len(PLACES))] + f"ville{article}x{number}"
            text = f"{person} lives in {place}. " + " ".join(rng.choice(NAMES) for _ in range(rng.randint(5, 40)))
            asked = {"id": f"q{article}-{number}", "question": f"Where does {person} live?"}
            answers = [{"text": place, "answer_start": 0}, {"text": f"in {place}", "answer_start": 0}]
            impossible = {"id": f"no{article}-{number}", "question": "Who?", "answers": [], "is_impossible": True}
            of_article.append({"context": text, "qas": [{**asked, "answers": answers}, impossible]})
        data.append({"title": f"Article {article}", "paragraphs": of_article})
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return path


def write_hotpotqa(path, count=12):
    """Two supporting documents and four others a question."""
    rng, records = random.Random(1), []
    for number in range(count):
        person, place, river = (
            f"{NAMES[number % 20]} H{number}",
            f"{PLACES[number % 16]}burg{number}",
            f"River R{number}",
        )
        context = [
            [
                f"Title {number}-{index}",
                [f"Sentence {number} {index}. ", " ".join(rng.choices(NAMES, k=rng.randint(1, 30)))],
            ]
            for index in range(4)
        ]
        context[1:1] = [[person, [f"{person} was born in {place}."]], [place, [f"{place} lies on the {river}."]]]
        records.append(
            {
                "_id": f"h{number}",
                "question": f"On which river lies the birthplace of {person}?",
                "answer": river,
                "supporting_facts": [[person, 0], [place, 0]],
                "context": context,
            }
        )
    path.write_text(json.dumps(records))
    return path


def write_longbench(path, count=3, words=300):
    """LongBench's form; the context is numbered words."""
    lines = []
    for number in range(count):
        context = " ".join(f"{number}w{index}" for index in range(words))
        record = {
            "input": f"Which word is {number}?",
            "context": context,
            "answers": [f"w{number}", "none"],
            "length": words,
        }
        lines.append({**record, "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": f"l{number}"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_longbench_v2(path, count=3):
    records = []
    for number in range(count):
        choices = {f"choice_{letter}": f"choice {letter} {number}" for letter in "ABCD"}
        record = {
            "_id": f"v{number}",
            "context": f"A text {{of}} {number}. " * 9,
            "question": f"Which {number}?",
            **choices,
        }
        records.append({**record, "answer": "ABCD"[number], "difficulty": "easy", "length": "short", "domain": "d"})
    path.write_text(json.dumps(records))
    return path
