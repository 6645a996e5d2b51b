#!/usr/bin/env python3
"""Makes data/tokenizer.json: a byte-level BPE vocabulary learnt from the sample's training documents (every seventh is held out).

Run once; its output is committed:  python3 samples/LongDocumentSummarization/make_tokenizer.py
"""
import collections
import heapq
import json
import pathlib
import re

DATA = pathlib.Path(__file__).parent / "data"
VOCABULARY = 4096
SPECIAL = ["<s>", "</s>"]
SPLIT = r" ?[^\W\d_]+| ?\d{1,3}| ?(?:_|[^\s\w])+|\s+(?!\S)|\s+"  # Python's re
SPLIT_JSON = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # the same for tokenizer.json


def bytes_to_unicode():
    """GPT-2's printable character for each byte."""
    keep = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    rest = [b for b in range(256) if b not in keep]
    return {**{b: chr(b) for b in keep}, **{b: chr(256 + n) for n, b in enumerate(rest)}}


def train(texts):
    table = bytes_to_unicode()
    counts = collections.Counter(piece for t in texts for piece in re.findall(SPLIT, t))
    words = [([table[b] for b in w.encode()], n) for w, n in sorted(counts.items())]
    pairs, places = collections.Counter(), collections.defaultdict(set)
    for i, (word, n) in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += n
            places[pair].add(i)
    vocabulary = [*SPECIAL, *sorted(table.values())]
    heap = [(-n, p) for p, n in pairs.items()]
    heapq.heapify(heap)
    merges = []
    while len(vocabulary) < VOCABULARY and heap:
        negative, pair = heapq.heappop(heap)
        if pairs[pair] != -negative:
            continue  # an older count
        merges.append(pair)
        vocabulary.append("".join(pair))
        changed = set()
        for i in list(places[pair]):
            word, n = words[i]
            merged, k = [], 0
            while k < len(word):
                if tuple(word[k:k + 2]) == pair:
                    merged.append("".join(pair))
                    k += 2
                else:
                    merged.append(word[k])
                    k += 1
            for p in zip(word, word[1:]):
                pairs[p] -= n
                changed.add(p)
            for p in zip(merged, merged[1:]):
                pairs[p] += n
                places[p].add(i)
                changed.add(p)
            words[i] = (merged, n)
        for p in changed:
            if pairs[p] > 0:
                heapq.heappush(heap, (-pairs[p], p))
    return vocabulary, merges


def main():
    documents = [json.loads(line) for line in (DATA / "sqlite_docs.jsonl").open(encoding="utf-8")]
    texts = [d[part] for i, d in enumerate(documents) if i % 7 != 3 for part in ("document", "summary")]
    vocabulary, merges = train(texts)
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for i, t in enumerate(SPECIAL)]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT_JSON}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {t: i for i, t in enumerate(vocabulary)}, "merges": [" ".join(p) for p in merges]},
    }
    (DATA / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (DATA / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 32768}, indent=1) + "\n")


main()
