class Constraint:
    @classmethod
    def of(cls, tokenizer, args, stop_ids, vocabulary):
        return None
