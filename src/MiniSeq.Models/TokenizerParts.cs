using System.Buffers;
using System.Globalization;
using System.Text;
using System.Text.RegularExpressions;

namespace MiniSeq.Models;

/// <summary>What a tokenizer file says, ready to run: text is cut at added tokens, normalized, split into pieces, and the pieces encoded.</summary>
internal sealed record TokenizerParts
{
    /// <summary>Every token that can be named, added ones included.</summary>
    public required Dictionary<string, int> Ids { get; init; }

    public required BytePairEncoder Model { get; init; }

    public required List<AddedToken> Added { get; init; }

    /// <summary>Ids that <c>Decode</c> leaves out when it is asked to.</summary>
    public required HashSet<int> Special { get; init; }

    public Func<string, string> Normalize { get; init; } = text => text;

    /// <summary>Pieces of a normalized section; the flag says whether the section begins the text.</summary>
    public Func<string, bool, IEnumerable<string>> Split { get; init; } = (text, _) => [text];

    /// <summary>Special tokens before and after a text.</summary>
    public (int[] Before, int[] After) Template { get; init; } = ([], []);

    public required TokenDecoder Decoder { get; init; }
}

/// <summary>A token found in the text before anything else happens to it.</summary>
/// <param name="Content">The text, already normalized where <paramref name="Normalized"/>.</param>
/// <param name="Id">Its id.</param>
/// <param name="Normalized">Whether it is looked for in normalized text, after those that are not.</param>
/// <param name="LeftStrip">Whether it takes the white space before it.</param>
/// <param name="RightStrip">Whether it takes the white space after it.</param>
/// <param name="SingleWord">Whether it must not touch a letter or digit.</param>
internal sealed record AddedToken(string Content, int Id, bool Normalized, bool LeftStrip, bool RightStrip, bool SingleWord);

/// <summary>Finds added tokens: the leftmost first, and the longest of those that begin at the same place.</summary>
internal sealed class AddedTokens
{
    private readonly Dictionary<string, AddedToken> _tokens = [];
    private readonly Dictionary<char, int[]> _lengths;
    private readonly SearchValues<char> _first;

    public AddedTokens(IEnumerable<AddedToken> tokens)
    {
        foreach (var token in tokens.Where(token => token.Content.Length > 0))
            _tokens[token.Content] = token;
        _lengths = _tokens.Keys.GroupBy(text => text[0]).ToDictionary(group => group.Key,
            group => group.Select(text => text.Length).Distinct().OrderDescending().ToArray());
        _first = SearchValues.Create([.. _lengths.Keys]);
    }

    /// <summary>Cuts a text into stretches without tokens (never empty) and tokens.</summary>
    public IEnumerable<(int Start, string Text, AddedToken? Token)> Cut(string text)
    {
        var done = 0;
        for (var at = Next(text, 0); at >= 0; at = Next(text, at))
        {
            if (Match(text, at) is not { } token)
            {
                at++;
                continue;
            }
            var begin = at;
            while (token.LeftStrip && begin > done && char.IsWhiteSpace(text[begin - 1]))
                begin--;
            at += token.Content.Length;
            while (token.RightStrip && at < text.Length && char.IsWhiteSpace(text[at]))
                at++;
            if (begin > done)
                yield return (done, text[done..begin], null);
            yield return (begin, token.Content, token);
            done = at;
        }
        if (done < text.Length)
            yield return (done, done == 0 ? text : text[done..], null);
    }

    private int Next(string text, int from)
    {
        var found = text.AsSpan(from).IndexOfAny(_first);
        return found < 0 ? found : from + found;
    }

    private AddedToken? Match(string text, int at)
    {
        var tokens = _tokens.GetAlternateLookup<ReadOnlySpan<char>>();
        foreach (var length in _lengths[text[at]])
            if (at + length <= text.Length && tokens.TryGetValue(text.AsSpan(at, length), out var token) && (!token.SingleWord || IsWord(text, at, length)))
                return token;
        return null;
    }

    private static bool IsWord(string text, int at, int length) =>
        (at == 0 || !IsWordCharacter(text[at - 1])) && (at + length == text.Length || !IsWordCharacter(text[at + length]));

    private static bool IsWordCharacter(char c) => char.IsLetterOrDigit(c) || c == '_';
}

/// <summary>Added tokens to look for in a text: those that stand there as they are, then those of the normalized text.</summary>
internal sealed class AddedTokenSet(IEnumerable<AddedToken> tokens)
{
    public AddedTokens Raw { get; } = new(tokens.Where(token => !token.Normalized));

    public AddedTokens Normalized { get; } = new(tokens.Where(token => token.Normalized));
}

/// <summary>How a splitter treats what its pattern matches (the names are Hugging Face's).</summary>
internal enum SplitBehavior
{
    /// <summary>Matches are pieces of their own.</summary>
    Isolated,
    /// <summary>Matches are dropped.</summary>
    Removed,
    /// <summary>A match ends the piece before it.</summary>
    MergedWithPrevious,
    /// <summary>A match begins the piece after it.</summary>
    MergedWithNext,
    /// <summary>Neighbouring matches are one piece.</summary>
    Contiguous,
}

/// <summary>Splits text by a regular expression that sees whole characters.</summary>
/// <remarks>
/// .NET's expressions see UTF-16: to them the letter U+20BB7 is two code units that are no letters. So text with characters beyond U+FFFF
/// is matched through a copy in which each of them is replaced by one character of the same general category.
/// </remarks>
internal sealed class Splitter
{
    private static readonly TimeSpan s_limit = TimeSpan.FromSeconds(20); // a pattern comes with the model, and may be hostile
    private static readonly char[] s_standIns = StandIns();
    private readonly Regex _pattern;
    private readonly SplitBehavior _behavior;
    private readonly bool _invert;

    public Splitter(string pattern, SplitBehavior behavior, bool invert = false)
    {
        _pattern = new Regex(pattern, RegexOptions.Compiled | RegexOptions.CultureInvariant, s_limit);
        (_behavior, _invert) = (behavior, invert);
    }

    public List<string> Split(string text)
    {
        var stretches = Stretches(text);
        var pieces = new List<(int Begin, int End)>(stretches.Count);
        for (var i = 0; i < stretches.Count; i++)
        {
            var (begin, end, match) = stretches[i];
            var afterMatch = i > 0 && stretches[i - 1].Match;
            var joins = pieces.Count > 0 && _behavior switch
            {
                SplitBehavior.MergedWithPrevious => match && !afterMatch,
                SplitBehavior.MergedWithNext => !match && afterMatch,
                SplitBehavior.Contiguous => match == afterMatch,
                _ => false,
            };
            if (joins)
                pieces[^1] = (pieces[^1].Begin, end);
            else if (!match || _behavior != SplitBehavior.Removed)
                pieces.Add((begin, end));
        }
        return pieces.ConvertAll(piece => text[piece.Begin..piece.End]);
    }

    /// <summary>The text as alternating gaps and matches, none of them empty.</summary>
    private List<(int Begin, int End, bool Match)> Stretches(string text)
    {
        var (seen, offsets) = WholeCharacters(text);
        var stretches = new List<(int, int, bool)>();
        var done = 0;
        foreach (var match in _pattern.EnumerateMatches(seen))
        {
            if (match.Length == 0)
                continue;
            Add(done, match.Index, _invert);
            Add(match.Index, match.Index + match.Length, !_invert);
            done = match.Index + match.Length;
        }
        Add(done, seen.Length, _invert);
        return stretches;

        void Add(int begin, int end, bool match)
        {
            if (begin < end)
                stretches.Add((offsets?[begin] ?? begin, offsets?[end] ?? end, match));
        }
    }

    private static (string Text, int[]? Offsets) WholeCharacters(string text)
    {
        if (text.AsSpan().IndexOfAnyInRange('\uD800', '\uDFFF') < 0)
            return (text, null);
        var seen = new StringBuilder(text.Length);
        var offsets = new List<int>(text.Length + 1);
        var at = 0;
        foreach (var rune in text.EnumerateRunes())
        {
            offsets.Add(at);
            at += rune.Utf16SequenceLength;
            seen.Append(rune.IsBmp ? (char)rune.Value : s_standIns[(int)Rune.GetUnicodeCategory(rune)]);
        }
        offsets.Add(at);
        return (seen.ToString(), [.. offsets]);
    }

    /// <summary>For each category a character that has it, none of them ASCII: patterns name ASCII characters one by one.</summary>
    private static char[] StandIns()
    {
        var standIns = new char[(int)UnicodeCategory.OtherNotAssigned + 1];
        for (var c = '\uFFFF'; c >= '\u0080'; c--)
            standIns[(int)char.GetUnicodeCategory(c)] = c;
        return standIns;
    }
}

/// <summary>GPT-2's alphabet: a printable character for each of the 256 bytes.</summary>
internal static class ByteAlphabet
{
    private static readonly char[] s_chars = Chars();
    private static readonly Dictionary<char, byte> s_bytes = Enumerable.Range(0, 256).ToDictionary(value => s_chars[value], value => (byte)value);

    public static string Spell(string text)
    {
        var utf8 = Encoding.UTF8.GetBytes(text);
        return string.Create(utf8.Length, utf8, (chars, bytes) =>
        {
            for (var i = 0; i < bytes.Length; i++)
                chars[i] = s_chars[bytes[i]];
        });
    }

    /// <summary>The bytes a token spells; null if it has characters outside the alphabet.</summary>
    public static byte[]? Bytes(string token)
    {
        var bytes = new byte[token.Length];
        for (var i = 0; i < token.Length; i++)
            if (!s_bytes.TryGetValue(token[i], out bytes[i]))
                return null;
        return bytes;
    }

    private static char[] Chars()
    {
        var chars = new char[256];
        var spare = 256;
        for (var value = 0; value < 256; value++)
            chars[value] = (char)(value is >= '!' and <= '~' or >= 0xA1 and <= 0xAC or >= 0xAE ? value : spare++);
        return chars;
    }
}

/// <summary>From tokens back to bytes of UTF-8.</summary>
internal sealed record TokenDecoder
{
    /// <summary>Whether tokens are spelled in <see cref="ByteAlphabet"/>.</summary>
    public bool ByteLevel { get; init; }

    /// <summary>Whether <c>&lt;0x0A&gt;</c> stands for a byte.</summary>
    public bool ByteFallback { get; init; }

    /// <summary>Replacements in every token, in this order.</summary>
    public IReadOnlyList<(string Old, string New)> Replacements { get; init; } = [];

    /// <summary>The character of which the decoded text loses up to <see cref="Strip"/> at its beginning.</summary>
    public char Stripped { get; init; } = ' ';

    /// <summary>How many of them.</summary>
    public int Strip { get; init; }

    public byte[] Bytes(string token, bool added)
    {
        if (ByteLevel && !added && ByteAlphabet.Bytes(token) is { } spelled)
            return spelled;
        if (ByteFallback && ByteOf(token) is { } value)
            return [value];
        foreach (var (old, replacement) in Replacements)
            token = token.Replace(old, replacement, StringComparison.Ordinal);
        return Encoding.UTF8.GetBytes(token);
    }

    public static byte? ByteOf(string token) =>
        token.Length == 6 && token.StartsWith("<0x", StringComparison.Ordinal) && token[5] == '>'
            && byte.TryParse(token.AsSpan(3, 2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out var value) ? value : null;
}
