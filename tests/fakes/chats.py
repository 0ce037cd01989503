"""A chat with a queue of replies and a history of what it was asked."""

from tuner.trial import Reply


class QueueChat:
    name = "queue:1"

    def __init__(self, *replies):
        self.replies, self.asked, self.schemas = list(replies), [], []

    def reply(self, messages, schema):
        self.asked.append(list(messages))
        self.schemas.append(schema)
        text = self.replies.pop(0)
        if isinstance(text, Exception):
            raise text
        return Reply(text=text, model="queue-1", input_tokens=100, output_tokens=10, seconds=0.1)
