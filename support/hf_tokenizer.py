"""The tokenizer's files of a Hugging Face directory, checked and written."""

import shutil

from corpus.tokenizer import EOS, PAD
from support.files import UserError, read_json, write_json
from support.hf_config import is_hf
from support.text import read_text, shown
from support.vocabulary import open_tokenizer

# data.py's render_chat in Jinja, for transformers' apply_chat_template. What a file of chats may
# hold is checked in support/chats.py. Between the two marks of `generation` stands what is trained:
# transformers' return_assistant_tokens_mask and trainers such as TRL's look for them.
CHAT_TEMPLATE = (
    "{{ eos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'].strip() + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'].strip() }}{% endif %}"
    "{% if message['role'] != 'assistant' or not loop.last or add_generation_prompt %}{{ '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")


def check_tokenizer_config(path, tokenizer):
    """UserError if tokenizer_config.json makes transformers' ids differ from the Tokenizer's."""
    place = path / "tokenizer_config.json"
    settings = read_json(place) if place.is_file() else {}
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space"):
        if settings.get(key):
            raise UserError(f"{place}: {key}={shown(settings[key])} adds to each text what OLMo "
                            "1.0 was not trained with; set it to false")
    added = {token["id"]: token["content"] for token in tokenizer.spec["added_tokens"]}
    decoder = settings.get("added_tokens_decoder") or {}
    try:
        listed = {int(number): token["content"] for number, token in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{place}: added_tokens_decoder: not {{id: token}}; save the tokenizer "
                        "again") from None
    for number, content in listed.items():
        if added.get(number) != content:
            raise UserError(f"{place}: added_tokens_decoder: id {number} is {content!r}, and in "
                            f"tokenizer.json {added.get(number)!r}; save the tokenizer again, so "
                            "that both files say the same")


def chat_template_of(path):
    """The chat template of a Hugging Face directory, or None; transformers 5 has a file for it."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    file = path / "tokenizer_config.json"
    return read_json(file).get("chat_template") if file.is_file() else None


def template_of(path):
    """The chat template of a run that was tuned, or of another directory; None for a base model."""
    config = path / "config.json"
    if is_hf(path):
        return chat_template_of(path)
    # adapt.py made the run if "method" is a key of its config
    return CHAT_TEMPLATE if config.is_file() and "method" in read_json(config) else None


def warn_of_other_template(path):
    """Print a warning if a directory's chat template is not Tulu's, which is the one used here."""
    template = chat_template_of(path)
    if template and "<|assistant|>" not in str(template) and "<|' + message" not in str(template):
        print(f"warning: {path}: its chat template is not Tulu's, which is used here: the model "
              "may have learned another form of chats")


def write_tokenizer(file, out, config, chat_template):
    """Copy tokenizer.json and name its special tokens the way that AutoTokenizer reads them."""
    open_tokenizer(file, config)
    shutil.copyfile(file, out / "tokenizer.json")
    special = {"eos_token": EOS, "pad_token": PAD}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
        # A batch of prompts must end in one column: behind padding no answer can go on.
        "padding_side": "left"}
    if chat_template:
        settings["chat_template"] = chat_template
    write_json(out / "special_tokens_map.json", special)
    write_json(out / "tokenizer_config.json", settings | special)
