using System.Text.Json;
using System.Text.RegularExpressions;

namespace MiniSeq.Models;

/// <summary>Reads Hugging Face's <c>tokenizer.json</c>. What it does not know it refuses by name, rather than give other ids than the model was
/// trained with.</summary>
internal static class TokenizerJson
{
    // From OpenAI's GPT-2; Hugging Face's ByteLevel uses it where use_regex is true.
    private const string Gpt2Pattern = @"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

    public static TokenizerParts Read(string file)
    {
        try
        {
            return Text.ParseObject(File.ReadAllBytes(file), file, Parse);
        }
        catch (NotSupportedException fault)
        {
            throw new NotSupportedException($"{file}: {fault.Message}", fault);
        }
        catch (InvalidDataException fault) when (!fault.Message.StartsWith(file, StringComparison.Ordinal))
        {
            throw new InvalidDataException($"{file}: {fault.Message}.", fault);
        }
        catch (RegexParseException fault)
        {
            throw new NotSupportedException($"{file}: .NET does not know this regular expression: {fault.Message}", fault);
        }
    }

    private static TokenizerParts Parse(JsonElement root)
    {
        var model = root.Get("model");
        RefuseOtherThanBytePairs(model);
        var ids = new Dictionary<string, int>();
        foreach (var token in model.Get("vocab").EnumerateObject())
            ids.Add(token.Name, Id(token.Value, token.Name));
        var encoder = Encoder(model, new Dictionary<string, int>(ids));
        var normalize = Normalizer(Optional(root, "normalizer"));
        var split = PreTokenizer(Optional(root, "pre_tokenizer"));
        var added = new List<AddedToken>();
        var special = new HashSet<int>();
        foreach (var token in Items(root, "added_tokens"))
            AddToken(token, normalize, ids, added, special);
        return new TokenizerParts
        {
            Ids = ids,
            Model = encoder,
            Added = added,
            Special = special,
            Normalize = normalize,
            Split = split,
            Template = Template(Optional(root, "post_processor")),
            Decoder = Decoder(Optional(root, "decoder") ?? throw new NotSupportedException("a tokenizer without a decoder is not supported.")),
        };
    }

    private static void RefuseOtherThanBytePairs(JsonElement model)
    {
        // Files of before 2021 leave the type out; a list of merges is then the mark of byte pairs.
        var type = Optional(model, "type")?.GetString() ?? (Optional(model, "merges") is null ? "unnamed" : "BPE");
        if (type != "BPE")
            throw new NotSupportedException($"the tokenizer model '{type}' is not supported (supported: BPE).");
        foreach (var affix in new[] { "continuing_subword_prefix", "end_of_word_suffix" })
            if (Optional(model, affix)?.GetString() is { Length: > 0 } text)
                throw new NotSupportedException($"{affix} {Text.Of(text)} is not supported.");
        if (Optional(model, "dropout")?.GetDouble() > 0)
            throw new NotSupportedException("dropout in a tokenizer is not supported.");
    }

    private static BytePairEncoder Encoder(JsonElement model, Dictionary<string, int> vocabulary)
    {
        var merges = new List<Merge>();
        foreach (var merge in Items(model, "merges"))
            merges.Add(ParseMerge(merge, merges.Count));
        var unknown = Optional(model, "unk_token")?.GetString();
        return new BytePairEncoder(vocabulary, merges, Flag(model, "byte_fallback") ? ByteIds(vocabulary) : [],
            unknown is null ? null : vocabulary.TryGetValue(unknown, out var id) ? id : throw new InvalidDataException($"the unknown token {Text.Of(unknown)} is not in the vocabulary"),
            Flag(model, "fuse_unk"))
        { WholePieces = Flag(model, "ignore_merges") };
    }

    /// <summary>A merge is "a b", or ["a", "b"] in newer files.</summary>
    private static Merge ParseMerge(JsonElement merge, int rank)
    {
        var sides = merge.ValueKind == JsonValueKind.String ? merge.GetString()!.Split(' ')
            : merge.ValueKind == JsonValueKind.Array ? [.. merge.EnumerateArray().Select(side => side.GetString() ?? "")]
            : [];
        return sides.Length == 2 ? new Merge(sides[0], sides[1], rank) : throw new InvalidDataException($"merge {rank} is not a pair");
    }

    private static int[] ByteIds(Dictionary<string, int> vocabulary) =>
        [.. Enumerable.Range(0, 256).Select(value => vocabulary.GetValueOrDefault($"<0x{value:X2}>", -1))];

    private static void AddToken(JsonElement token, Func<string, string> normalize, Dictionary<string, int> ids, List<AddedToken> added, HashSet<int> special)
    {
        var content = token.Get("content").GetString()!;
        var id = Id(token.Get("id"), content);
        var normalized = Flag(token, "normalized");
        ids[content] = id;
        added.Add(new AddedToken(normalized ? normalize(content) : content, id, normalized, Flag(token, "lstrip"), Flag(token, "rstrip"), Flag(token, "single_word")));
        if (Flag(token, "special"))
            special.Add(id);
    }

    private static Func<string, string> Normalizer(JsonElement? normalizer)
    {
        if (normalizer is not { } step)
            return text => text;
        switch (Type(step))
        {
            case "Sequence":
                Func<string, string>[] steps = [.. Items(step, "normalizers").Select(item => Normalizer(item))];
                return text => steps.Aggregate(text, (current, next) => next(current));
            case "NFC":
                return Nfc.Normalize;
            case "Prepend":
                var prefix = step.Get("prepend").GetString()!;
                return text => text.Length == 0 ? text : prefix + text;
            case "Replace":
                var pattern = new Regex(Pattern(step), RegexOptions.CultureInvariant, TimeSpan.FromSeconds(20));
                var content = step.Get("content").GetString()!;
                return text => pattern.Replace(text, _ => content);
            case var type:
                throw new NotSupportedException($"the normalizer '{type}' is not supported (supported: NFC, Prepend, Replace, Sequence).");
        }
    }

    private static Func<string, bool, IEnumerable<string>> PreTokenizer(JsonElement? preTokenizer)
    {
        if (preTokenizer is not { } step)
            return (text, _) => [text];
        switch (Type(step))
        {
            case "Sequence":
                Func<string, bool, IEnumerable<string>>[] steps = [.. Items(step, "pretokenizers").Select(item => PreTokenizer(item))];
                return (text, first) => steps.Aggregate((IEnumerable<string>)[text],
                    (pieces, next) => pieces.SelectMany((piece, i) => next(piece, first && i == 0)));
            case "Split":
                var splitter = new Splitter(Pattern(step), Enum.TryParse<SplitBehavior>(step.Get("behavior").GetString(), out var behavior) && Enum.IsDefined(behavior)
                    ? behavior : throw new NotSupportedException($"the split behavior {step.Get("behavior")} is not supported."), Flag(step, "invert"));
                return (text, _) => splitter.Split(text);
            case "Digits":
                var digits = new Splitter(@"\p{N}", Flag(step, "individual_digits") ? SplitBehavior.Isolated : SplitBehavior.Contiguous);
                return (text, _) => digits.Split(text);
            case "ByteLevel":
                return ByteLevel(Flag(step, "add_prefix_space"), Flag(step, "use_regex", true));
            case "Metaspace":
                return Metaspace(step);
            case var type:
                throw new NotSupportedException($"the pre-tokenizer '{type}' is not supported (supported: ByteLevel, Digits, Metaspace, Sequence, Split).");
        }
    }

    private static Func<string, bool, IEnumerable<string>> ByteLevel(bool prefixSpace, bool useRegex)
    {
        var splitter = useRegex ? new Splitter(Gpt2Pattern, SplitBehavior.Isolated) : null;
        return (text, _) =>
        {
            if (prefixSpace && text.Length > 0 && text[0] != ' ')
                text = " " + text;
            return splitter is null ? [ByteAlphabet.Spell(text)] : splitter.Split(text).Select(ByteAlphabet.Spell);
        };
    }

    private static Func<string, bool, IEnumerable<string>> Metaspace(JsonElement step)
    {
        var mark = Mark(step);
        var scheme = PrependScheme(step);
        var splitter = Flag(step, "split", true) ? new Splitter(Regex.Escape(mark), SplitBehavior.MergedWithNext) : null;
        return (text, first) =>
        {
            text = text.Replace(" ", mark, StringComparison.Ordinal);
            if ((scheme == "always" || scheme == "first" && first) && !text.StartsWith(mark, StringComparison.Ordinal))
                text = mark + text;
            return splitter is null ? [text] : splitter.Split(text);
        };
    }

    private static string Mark(JsonElement metaspace) =>
        metaspace.Get("replacement").GetString() is { Length: > 0 } mark ? mark : throw new InvalidDataException("the replacement of a Metaspace is empty");

    private static string PrependScheme(JsonElement metaspace) =>
        Optional(metaspace, "prepend_scheme")?.GetString() ?? (Flag(metaspace, "add_prefix_space", true) ? "always" : "never");

    /// <summary>A Split or Replace pattern: a literal text or a regular expression.</summary>
    private static string Pattern(JsonElement step)
    {
        var pattern = step.Get("pattern");
        return Optional(pattern, "String")?.GetString() is { } literal ? Regex.Escape(literal) : pattern.Get("Regex").GetString()!;
    }

    private static (int[] Before, int[] After) Template(JsonElement? postProcessor)
    {
        if (postProcessor is not { } step)
            return ([], []);
        switch (Type(step))
        {
            case "ByteLevel": // trims offsets, which are not given here
                return ([], []);
            case "Sequence":
                return Items(step, "processors").Select(item => Template(item)).Aggregate((outer: (int[])[], after: (int[])[]),
                    (sum, next) => ([.. next.Before, .. sum.outer], [.. sum.after, .. next.After]));
            case "TemplateProcessing":
                return ParseTemplate(step);
            case var type:
                throw new NotSupportedException($"the post-processor '{type}' is not supported (supported: ByteLevel, Sequence, TemplateProcessing).");
        }
    }

    private static (int[] Before, int[] After) ParseTemplate(JsonElement step)
    {
        var tokens = step.Get("special_tokens");
        List<int> before = [], after = [];
        var current = before;
        foreach (var item in Items(step, "single"))
            if (Optional(item, "SpecialToken") is { } token)
                current.AddRange(tokens.Get(token.Get("id").GetString()!).Get("ids").EnumerateArray().Select(id => id.GetInt32()));
            else
                current = after;
        return ([.. before], [.. after]);
    }

    private static TokenDecoder Decoder(JsonElement decoder)
    {
        List<JsonElement> steps = Type(decoder) == "Sequence" ? [.. Items(decoder, "decoders")] : [decoder];
        return steps.Aggregate(new TokenDecoder(), AddStep);
    }

    private static TokenDecoder AddStep(TokenDecoder decoder, JsonElement step)
    {
        switch (Type(step))
        {
            case "ByteLevel":
                return decoder with { ByteLevel = true };
            case "ByteFallback":
                return decoder with { ByteFallback = true };
            case "Fuse":
                return decoder;
            case "Replace" when Optional(step.Get("pattern"), "String")?.GetString() is { Length: > 0 } old:
                return decoder with { Replacements = [.. decoder.Replacements, (old, step.Get("content").GetString()!)] };
            case "Strip" when step.Get("stop").GetInt32() == 0 && step.Get("content").GetString() is { Length: 1 } content:
                return decoder with { Stripped = content[0], Strip = step.Get("start").GetInt32() };
            case "Metaspace":
                return decoder with
                {
                    Replacements = [.. decoder.Replacements, (Mark(step), " ")],
                    Strip = PrependScheme(step) == "never" ? 0 : 1,
                };
            case var type:
                throw new NotSupportedException($"this form of the decoder '{type}' is not supported: {Text.Of(step.GetRawText())}.");
        }
    }

    private static int Id(JsonElement value, string token) =>
        value.TryGetInt32(out var id) && id is >= 0 and < int.MaxValue ? id : throw new InvalidDataException($"the token {Text.Of(token)} has the id {value.GetRawText()}");

    private static string Type(JsonElement step) => step.Get("type").GetString()!;

    private static bool Flag(JsonElement element, string name, bool otherwise = false) => Optional(element, name)?.GetBoolean() ?? otherwise;

    private static JsonElement Get(this JsonElement element, string name) =>
        Optional(element, name) ?? throw new InvalidDataException($"'{name}' is missing in {Text.Of(element.GetRawText())}");

    private static JsonElement? Optional(JsonElement element, string name) =>
        element.TryGetProperty(name, out var value) && value.ValueKind != JsonValueKind.Null ? value : null;

    private static IEnumerable<JsonElement> Items(JsonElement element, string name) => Optional(element, name)?.EnumerateArray() ?? Enumerable.Empty<JsonElement>();
}
