"""The questions of a task as a tuned model is asked them (--chat).

MMLU is asked as Open Instruct asks it (eval/mmlu/run_eval.py at 8dadfdf4, February 2024, with the
template `create_prompt_with_olmo_chat_format`): the paper's numbers are from there. It asks no
other task in this way; for those the answer begins right after the assistant's header.
"""

from data import render_chat
from support.files import UserError


def chat_questions(task, tokenizer, max_seq_len):
    """Returns (questions, shortened): a task's Questions, their contexts as ids of a chat.

    shortened: how many questions had too long a context, and lost the last of their solved examples
    until the rest fitted into max_seq_len; 0 where there are no examples.
    """
    questions = []
    shortened = 0
    for question in task.questions:
        asked = as_chat(question, task, tokenizer)
        before = question
        while question.examples and len(asked.choices[0][0]) > max_seq_len:
            question = without_last_example(question)
            asked = as_chat(question, task, tokenizer)
        shortened += question is not before
        questions.append(asked)
    return questions, shortened


def as_chat(question, task, tokenizer):
    """A Question whose contexts are ids: a user's message, and the start of the answer to it."""
    begin = tokenizer.encode(task.answer_begins)
    rendered = {}  # the choices of a question mostly have the same context

    def in_chat(request):
        context, continuation = request
        if context not in rendered:
            message = {"role": "user", "content": context}
            ids, _ = render_chat([message], tokenizer, reply=True)
            rendered[context] = ids + begin
        if not begin:  # an answer does not begin with a space
            continuation = continuation.strip()
        if not continuation:
            raise UserError(f"{task.name}: a choice is white space alone, which is no answer in a "
                            "chat; evaluate it without --chat, or leave the question out")
        return rendered[context], continuation

    choices = [in_chat(request) for request in question.choices]
    unconditional = [in_chat(request) for request in question.unconditional]
    return question._replace(choices=choices, unconditional=unconditional)


def without_last_example(question):
    """A Question with one solved example less in its contexts."""
    examples = "".join(question.examples)
    kept = question.examples[:-1]
    choices = [(context.replace(examples, "".join(kept), 1), continuation)
               for context, continuation in question.choices]
    return question._replace(choices=choices, examples=kept)
