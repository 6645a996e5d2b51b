using System.Globalization;
using System.Text;
using System.Text.Json;
using Microsoft.ML.Tokenizers;

namespace MiniSeq.Models;

/// <summary>The tokenizer of a Hugging Face model: text to token ids and back.</summary>
/// <remarks>
/// Reads <c>tokenizer.json</c> with a BPE model, byte-level (Llama 3, Qwen 2 and 3) or with byte fallback (Llama 2, Mistral, Gemma), and
/// SentencePiece's <c>tokenizer.model</c> of the BPE kind. Other kinds are refused. <c>clean_up_tokenization_spaces</c> is not applied: decoding
/// gives the text the ids stand for. An instance may be used from several threads.
/// </remarks>
public sealed class HuggingFaceTokenizer
{
    private const string JsonName = "tokenizer.json";
    private const string ModelName = "tokenizer.model";
    private const string ConfigName = "tokenizer_config.json";
    private const string JinjaName = "chat_template.jinja";

    // What transformers writes for a tokenizer; config.json and generation_config.json belong to the model.
    private static readonly string[] s_savedNames =
        [JsonName, ModelName, ConfigName, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", JinjaName];

    private readonly TokenizerParts _parts;
    private readonly AddedTokenSet _found;
    private readonly Dictionary<int, string> _tokens = [];
    private readonly HashSet<int> _added;
    private readonly List<string> _files;

    private HuggingFaceTokenizer(TokenizerParts parts, List<string> files)
    {
        (_parts, _files) = (parts, files);
        _found = new AddedTokenSet(parts.Added);
        _added = [.. parts.Added.Select(token => token.Id)];
        foreach (var (token, id) in parts.Ids)
            _tokens.TryAdd(id, token);
        VocabSize = _tokens.Count == 0 ? 0 : checked(_tokens.Keys.Max() + 1);
    }

    /// <summary>One more than the largest id: the least number of rows an embedding needs (models often have some more).</summary>
    public int VocabSize { get; }

    /// <summary>The token a text begins with; null if no file names one.</summary>
    public int? BosTokenId { get; private set; }

    /// <summary>The token that ends a text: <c>tokenizer_config.json</c>'s, or else the first of <see cref="EosTokenIds"/>; null if no file names one.</summary>
    public int? EosTokenId { get; private set; }

    /// <summary>All tokens that end a generated text: those of <c>tokenizer_config.json</c>, <c>generation_config.json</c> and <c>config.json</c>.</summary>
    public IReadOnlySet<int> EosTokenIds { get; private set; } = new HashSet<int>();

    /// <summary>The token that fills up batches; null if no file names one.</summary>
    public int? PadTokenId { get; private set; }

    /// <summary>Loads the tokenizer of a model folder.</summary>
    /// <param name="folder">Holds <c>tokenizer.json</c> or else <c>tokenizer.model</c>, and may hold <c>tokenizer_config.json</c>,
    /// <c>generation_config.json</c> and <c>config.json</c>, which name the special tokens.</param>
    /// <remarks>As in SentencePiece, control tokens in the text (<c>&lt;s&gt;</c>) are not recognized with <c>tokenizer.model</c>, except those under
    /// <c>added_tokens_decoder</c> of <c>tokenizer_config.json</c>.</remarks>
    /// <exception cref="FileNotFoundException">The folder holds no tokenizer.</exception>
    /// <exception cref="InvalidDataException">A file is damaged.</exception>
    /// <exception cref="NotSupportedException">The tokenizer is of another kind (WordPiece, Unigram, WordLevel, or a step of its own).</exception>
    public static HuggingFaceTokenizer FromPretrained(string folder)
    {
        ArgumentException.ThrowIfNullOrEmpty(folder);
        var config = ReadConfig(Path.Combine(folder, ConfigName));
        var json = Path.Combine(folder, JsonName);
        var model = Path.Combine(folder, ModelName);
        var parts = File.Exists(json) ? TokenizerJson.Read(json)
            : File.Exists(model) ? WithConfigured(SentencePieceModel.Read(model, config.AddBos ?? true, config.AddEos ?? false), config)
            : throw new FileNotFoundException($"{folder}: the folder holds neither {JsonName} nor {ModelName}.", json);
        var tokenizer = new HuggingFaceTokenizer(parts, [.. s_savedNames.Select(name => Path.Combine(folder, name)).Where(File.Exists)]);
        tokenizer.ChatTemplateText = ReadText(Path.Combine(folder, JinjaName)) ?? config.ChatTemplate;
        tokenizer.NameSpecialTokens(config, ReadModelConfig(Path.Combine(folder, "generation_config.json")), ReadModelConfig(Path.Combine(folder, "config.json")));
        return tokenizer;
    }

    /// <summary>Loads a single <c>tokenizer.json</c>. Such a file does not say which tokens are bos, eos and pad: those properties stay null.</summary>
    /// <exception cref="FileNotFoundException">There is no such file.</exception>
    /// <exception cref="InvalidDataException">The file is damaged.</exception>
    /// <exception cref="NotSupportedException">The tokenizer is of another kind.</exception>
    public static HuggingFaceTokenizer FromFile(string tokenizerJson)
    {
        ArgumentException.ThrowIfNullOrEmpty(tokenizerJson);
        if (!File.Exists(tokenizerJson))
            throw new FileNotFoundException($"{tokenizerJson}: no such file.", tokenizerJson);
        return new HuggingFaceTokenizer(TokenizerJson.Read(tokenizerJson), [tokenizerJson]);
    }

    /// <summary>The ids of a text.</summary>
    /// <param name="text">Any text; half of a surrogate pair counts as U+FFFD.</param>
    /// <param name="addSpecialTokens">Whether to add what the model expects around a text, a bos token for example.</param>
    public IReadOnlyList<int> Encode(string text, bool addSpecialTokens = true)
    {
        ArgumentNullException.ThrowIfNull(text);
        var ids = new List<int>(text.Length / 3);
        if (addSpecialTokens)
            ids.AddRange(_parts.Template.Before);
        EncodeText(text, first: true, _found, ids);
        if (addSpecialTokens)
            ids.AddRange(_parts.Template.After);
        return ids;
    }

    /// <summary>The text of some ids.</summary>
    /// <param name="ids">Token ids. Those outside the vocabulary (padding rows of the embedding, ignored labels) give no text.</param>
    /// <param name="skipSpecialTokens">Whether to leave out bos, eos and the like.</param>
    /// <remarks>Bytes that are no valid UTF-8 become U+FFFD.</remarks>
    public string Decode(IEnumerable<int> ids, bool skipSpecialTokens = true)
    {
        ArgumentNullException.ThrowIfNull(ids);
        var decoder = CreateStreamDecoder(skipSpecialTokens);
        var text = new StringBuilder();
        foreach (var id in ids)
            text.Append(decoder.Append(id));
        return text.Append(decoder.Flush()).ToString();
    }

    /// <summary>The id of a token as the tokenizer's files spell it; null if there is none.</summary>
    public int? TokenToId(string token) => _parts.Ids.TryGetValue(token, out var id) ? id : null;

    /// <summary>A decoder for ids that arrive one by one. All its output together is what <see cref="Decode"/> gives.</summary>
    public TokenStreamDecoder CreateStreamDecoder(bool skipSpecialTokens = true) => new(this, skipSpecialTokens);

    /// <summary>The same tokenizer as one of Microsoft.ML.Tokenizers, for code that wants that type. It adds no special tokens; its offsets count
    /// characters of the normalized text.</summary>
    public Tokenizer AsTokenizer() => new LibraryTokenizer(this);

    /// <summary>Copies the files the tokenizer was loaded from, byte for byte. The folder may be the one they are in.</summary>
    /// <param name="folder">The folder, created if missing.</param>
    public void SavePretrained(string folder)
    {
        ArgumentException.ThrowIfNullOrEmpty(folder);
        Directory.CreateDirectory(folder);
        using var pending = new PendingFiles();
        foreach (var file in _files)
        {
            // The name FromPretrained looks for, whatever the file given to FromFile was called.
            var target = Path.Combine(folder, _files.Count == 1 && !s_savedNames.Contains(Path.GetFileName(file)) ? JsonName : Path.GetFileName(file));
            if (Path.GetFullPath(file) != Path.GetFullPath(target))
                pending.Add(target).Write(File.ReadAllBytes(file));
        }
        pending.Commit();
    }

    internal TokenDecoder Decoder => _parts.Decoder;

    /// <summary>The UTF-8 bytes of a token; none for unknown ids and for special tokens that are to be skipped.</summary>
    internal byte[] Bytes(int id, bool skipSpecialTokens) =>
        !_tokens.TryGetValue(id, out var token) || skipSpecialTokens && _parts.Special.Contains(id) ? [] : _parts.Decoder.Bytes(token, _added.Contains(id));

    /// <summary>A token as its file spells it, and its bytes without the decoder's replacements.</summary>
    internal (string Token, byte[] Bytes) Spelling(int id) =>
        (_tokens[id], (_parts.Decoder with { Replacements = [] }).Bytes(_tokens[id], _added.Contains(id)));

    /// <summary>Hugging Face's <c>chat_template</c> of the folder, a Jinja program; null where no file has one.</summary>
    internal string? ChatTemplateText { get; private set; }

    /// <summary>The added tokens that are still found in a text whose special tokens are ordinary text (Hugging Face's <c>split_special_tokens</c>).</summary>
    /// <param name="others">Ids of more tokens that are not to be found.</param>
    internal AddedTokenSet WithoutSpecialTokens(IReadOnlySet<int> others) =>
        new(_parts.Added.Where(token => !_parts.Special.Contains(token.Id) && !others.Contains(token.Id)));

    /// <summary>Adds the ids of a text to <paramref name="ids"/>.</summary>
    /// <param name="text">Any text.</param>
    /// <param name="first">Whether nothing comes before it, no special token either: some tokenizers put a space there.</param>
    /// <param name="found">The added tokens to look for.</param>
    /// <param name="ids">Grows.</param>
    internal void EncodeText(string text, bool first, AddedTokenSet found, List<int> ids)
    {
        foreach (var (start, section, token) in found.Raw.Cut(text))
            if (token is not null)
                ids.Add(token.Id);
            else
                EncodeSection(_parts.Normalize(section), first && start == 0, found.Normalized, ids);
    }

    private void EncodeSection(string text, bool first, AddedTokens found, List<int> ids)
    {
        foreach (var (start, section, token) in found.Cut(text))
            if (token is not null)
                ids.Add(token.Id);
            else
                foreach (var piece in _parts.Split(section, first && start == 0))
                    _parts.Model.Encode(piece, ids);
    }

    private void NameSpecialTokens(TokenizerConfig config, params ModelConfig[] models)
    {
        BosTokenId = Named(config.Bos) ?? First(models.SelectMany(model => model.Bos));
        PadTokenId = Named(config.Pad) ?? First(models.SelectMany(model => model.Pad));
        var eos = models.SelectMany(model => model.Eos).ToList();
        EosTokenId = Named(config.Eos) ?? First(eos);
        EosTokenIds = (EosTokenId is { } id ? eos.Prepend(id) : eos).ToHashSet();

        int? Named(string? token) => token is null ? null : TokenToId(token);
        static int? First(IEnumerable<int> ids) => ids.Select(id => (int?)id).FirstOrDefault();
    }

    private static TokenizerParts WithConfigured(TokenizerParts parts, TokenizerConfig config)
    {
        foreach (var (token, special) in config.Added)
        {
            parts.Ids[token.Content] = token.Id;
            parts.Added.Add(token.Normalized ? token with { Content = parts.Normalize(token.Content) } : token);
            if (special)
                parts.Special.Add(token.Id);
        }
        return parts;
    }

    private sealed record TokenizerConfig(string? Bos, string? Eos, string? Pad, bool? AddBos, bool? AddEos, string? ChatTemplate, List<(AddedToken Token, bool Special)> Added);

    private sealed record ModelConfig(int[] Bos, int[] Eos, int[] Pad);

    private static TokenizerConfig ReadConfig(string file) =>
        !File.Exists(file) ? new(null, null, null, null, null, null, []) : Text.ParseObject(File.ReadAllBytes(file), file, root => new TokenizerConfig(
            Token(root, "bos_token"), Token(root, "eos_token"), Token(root, "pad_token"), Flag(root, "add_bos_token"), Flag(root, "add_eos_token"), ChatTemplate(root),
            root.TryGetProperty("added_tokens_decoder", out var added) ? [.. added.EnumerateObject().Select(Added)] : []));

    private static ModelConfig ReadModelConfig(string file) =>
        !File.Exists(file) ? new([], [], []) : Text.ParseObject(File.ReadAllBytes(file), file, root =>
            new ModelConfig(Ids(root, "bos_token_id"), Ids(root, "eos_token_id"), Ids(root, "pad_token_id")));

    private static (AddedToken Token, bool Special) Added(JsonProperty entry) =>
        (new AddedToken(entry.Value.GetProperty("content").GetString()!, int.Parse(entry.Name, CultureInfo.InvariantCulture),
            Flag(entry.Value, "normalized") ?? false, Flag(entry.Value, "lstrip") ?? false, Flag(entry.Value, "rstrip") ?? false, Flag(entry.Value, "single_word") ?? false),
            Flag(entry.Value, "special") ?? false);

    /// <summary>A template is written as its text, or as a list of named ones, of which the one called default counts.</summary>
    private static string? ChatTemplate(JsonElement root) =>
        !root.TryGetProperty("chat_template", out var value) ? null
        : value.ValueKind != JsonValueKind.Array ? Token(root, "chat_template")
        : value.EnumerateArray().Where(item => Token(item, "name") == "default").Select(item => Token(item, "template")).FirstOrDefault();

    private static string? ReadText(string file) => File.Exists(file) ? File.ReadAllText(file) : null;

    private static bool? Flag(JsonElement root, string name) =>
        root.TryGetProperty(name, out var value) && value.ValueKind is JsonValueKind.True or JsonValueKind.False ? value.GetBoolean() : null;

    /// <summary>A token is written as its text, or as an object with the text as content.</summary>
    private static string? Token(JsonElement root, string name) =>
        !root.TryGetProperty(name, out var value) ? null
        : value.ValueKind == JsonValueKind.Object && value.TryGetProperty("content", out var content) ? content.GetString()
        : value.ValueKind == JsonValueKind.String ? value.GetString() : null;

    /// <summary>One id, a list of ids, or null; some files say -1 for none.</summary>
    private static int[] Ids(JsonElement root, string name) =>
        !root.TryGetProperty(name, out var value) ? []
        : value.ValueKind == JsonValueKind.Array ? [.. value.EnumerateArray().Select(id => id.GetInt32()).Where(id => id >= 0)]
        : value.ValueKind == JsonValueKind.Number && value.TryGetInt32(out var id) && id >= 0 ? [id] : [];
}

/// <summary>Turns ids into text one by one and never gives out part of a character (a code point).</summary>
/// <remarks>Made by <see cref="HuggingFaceTokenizer.CreateStreamDecoder"/>; for one thread at a time.</remarks>
public sealed class TokenStreamDecoder
{
    private readonly HuggingFaceTokenizer _tokenizer;
    private readonly bool _skipSpecialTokens;
    private readonly Decoder _utf8 = Encoding.UTF8.GetDecoder();
    private int _strip;

    internal TokenStreamDecoder(HuggingFaceTokenizer tokenizer, bool skipSpecialTokens)
    {
        (_tokenizer, _skipSpecialTokens) = (tokenizer, skipSpecialTokens);
        _strip = tokenizer.Decoder.Strip;
    }

    /// <summary>Adds an id.</summary>
    /// <returns>The text that is certain now; empty while a character is incomplete.</returns>
    public string Append(int id) => Next(_tokenizer.Bytes(id, _skipSpecialTokens), flush: false);

    /// <summary>Ends the text, and makes the decoder ready for another one.</summary>
    /// <returns>U+FFFD if a character was left incomplete, else nothing.</returns>
    public string Flush()
    {
        var rest = Next([], flush: true);
        _strip = _tokenizer.Decoder.Strip;
        return rest;
    }

    private string Next(byte[] bytes, bool flush)
    {
        var chars = new char[_utf8.GetCharCount(bytes, flush)];
        ReadOnlySpan<char> text = chars.AsSpan(0, _utf8.GetChars(bytes, chars, flush));
        while (_strip > 0 && text.Length > 0)
        {
            var strips = text[0] == _tokenizer.Decoder.Stripped;
            _strip = strips ? _strip - 1 : 0;
            text = strips ? text[1..] : text;
        }
        return text.ToString();
    }
}
