"""manifest.json: what built data is, how it came about, and the hashes of its files."""

from collections import Counter

from corpus.inputs import input_digests
from corpus.storage import hash_of, shards_of, vocabulary_of
from corpus.tokenizer import Tokenizer
from support.files import file_sha256, read_json, write_json


def write_manifest(folder, config, repeats, mixed, settings):
    """Write manifest.json of a folder of built data.

    repeats: {source: how often it is shown}; mixed: the entries of the mix's shards, in their
    order; settings: what the folder's name is the hash of.
    """
    tokenizer = folder / "tokenizer.json"
    held_out = [folder / "held_out" / f"{source}.jsonl" for source in repeats]
    # all that training and evaluation read, and nothing else: a resumed run compares this hash,
    # and data that was built again by other code has the same one if its content is the same
    identity = [file_sha256(tokenizer), [[shard["file"], shard["sha256"]] for shard in mixed],
                [file_sha256(file) for file in held_out]]
    evaluation_files = {name: [sha256 for _, sha256 in input_digests(path, config.data_dir)]
                        for name, path in config.decontaminate.items()}
    write_json(folder / "manifest.json", {
        "sha256": hash_of(identity), **vocabulary_of(Tokenizer.load(tokenizer)),
        "sources": describe_sources(folder, config, repeats, mixed, settings["clean"]),
        "scorers": {"language": config.language_scorer, "content": config.content_scorer},
        "decontaminate": config.decontaminate, "evaluation_files": evaluation_files,
        "shards": mixed, "settings": settings})


def describe_sources(folder, config, repeats, mixed, clean_settings):
    """{source: its path and rules, the counts of its funnel, its tokens and share of the mix}."""
    mix_tokens = Counter()
    for shard in mixed:
        mix_tokens[shard["source"]] += shard["tokens"]
    described = {}
    for source in config.parse_sources():
        name = source.name
        sets = clean_settings[name].get("decontaminate", ())
        described[name] = {
            "path": source.path, "rules": source.rules,
            **read_json(folder / f"{name}.funnel.json"),
            "tokens": sum(shard["tokens"] for shard in shards_of(folder, name)),
            "repeats": repeats[name], "mix_tokens": mix_tokens[name],
            "share": mix_tokens[name] / mix_tokens.total(),
            "decontaminated": [entry[0] for entry in sets]}
    return described
