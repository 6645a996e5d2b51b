using System.Collections.Concurrent;
using System.Text;

namespace MiniSeq.Models;

/// <summary>A rule of byte-pair encoding: the neighbours <paramref name="Left"/> and <paramref name="Right"/> become one token; lower ranks first.</summary>
internal readonly record struct Merge(string Left, string Right, int Rank);

/// <summary>Byte-pair encoding with explicit merges, as Hugging Face and SentencePiece define it.</summary>
/// <remarks>
/// The merging is our own. Microsoft.ML.Tokenizers merges by id or score instead of by the model's list and breaks ties between equal merges in
/// another order (300 times "a" with Gemma), and its time grows with the square of a piece's length; this takes n log n. Safe for many threads.
/// </remarks>
internal sealed class BytePairEncoder
{
    private const int MaxCachedChars = 64;
    private const int MaxCachedWords = 1 << 16;
    private readonly Dictionary<string, int> _vocabulary;
    private readonly Dictionary<int, int> _runes = [];
    private readonly Dictionary<long, (int Rank, int Id)> _merges;
    private readonly HashSet<uint> _joined = [];
    private readonly int[] _bytes;
    private readonly int? _unknown;
    private readonly bool _fuseUnknown;
    private readonly ConcurrentDictionary<string, int[]> _cache = new();
    private int _cached;

    /// <param name="vocabulary">The tokens that text may become, with their ids.</param>
    /// <param name="merges">The rules; both sides and their union are in the vocabulary.</param>
    /// <param name="bytes">The ids of the 256 byte tokens a character outside the vocabulary becomes, -1 for those missing; empty for none.</param>
    /// <param name="unknown">The id of what has no bytes either; left out of the ids if null.</param>
    /// <param name="fuseUnknown">Whether a run of unknown characters is one unknown token.</param>
    /// <exception cref="InvalidDataException">A merge is not made of tokens.</exception>
    public BytePairEncoder(Dictionary<string, int> vocabulary, IReadOnlyCollection<Merge> merges, int[] bytes, int? unknown, bool fuseUnknown)
    {
        (_vocabulary, _bytes, _unknown, _fuseUnknown) = (vocabulary, bytes, unknown, fuseUnknown);
        foreach (var (token, id) in vocabulary)
            if (token.Length is 1 or 2 && Rune.DecodeFromUtf16(token, out var rune, out var used) == 0 && used == token.Length)
                _runes[rune.Value] = id;
        _merges = new(merges.Count);
        foreach (var merge in merges)
            Add(merge);
    }

    /// <summary>Whether a piece that is a token as a whole becomes that token, whatever the merges say (<c>ignore_merges</c>).</summary>
    public bool WholePieces { get; init; }

    /// <summary>Appends the ids of a piece of text.</summary>
    public void Encode(string piece, List<int> ids)
    {
        if (WholePieces && _vocabulary.TryGetValue(piece, out var whole))
        {
            ids.Add(whole);
            return;
        }
        var begin = 0;
        for (var i = 1; i <= piece.Length; i++)
            if (i == piece.Length || NeverJoined(piece[i - 1], piece[i]))
            {
                EncodeWord(piece.AsSpan(begin, i - begin), ids);
                begin = i;
            }
    }

    private void Add(Merge merge)
    {
        var text = merge.Left + merge.Right;
        if (!_vocabulary.TryGetValue(merge.Left, out var left) || !_vocabulary.TryGetValue(merge.Right, out var right) || !_vocabulary.TryGetValue(text, out var id))
            throw new InvalidDataException($"the merge {Text.Of(merge.Left)} + {Text.Of(merge.Right)} is not made of tokens of the vocabulary");
        _merges.TryAdd(Pair(left, right), (merge.Rank, id));
        for (var i = 1; i < text.Length; i++)
            _joined.Add(Chars(text[i - 1], text[i]));
    }

    /// <summary>No merge makes a token with these neighbours inside, so text may be cut between them: words are short, and can be remembered,
    /// even where the model itself does not split its text. Characters that are no tokens stay together, for the fusing of unknown ones.</summary>
    private bool NeverJoined(char left, char right) => !_joined.Contains(Chars(left, right)) && _runes.ContainsKey(left) && _runes.ContainsKey(right);

    private void EncodeWord(ReadOnlySpan<char> word, List<int> ids)
    {
        if (word.Length > MaxCachedChars)
        {
            ids.AddRange(Merge(word));
            return;
        }
        var cache = _cache.GetAlternateLookup<ReadOnlySpan<char>>();
        if (!cache.TryGetValue(word, out var known))
        {
            known = Merge(word);
            if (_cached < MaxCachedWords && Interlocked.Increment(ref _cached) <= MaxCachedWords)
                cache.TryAdd(word, known);
        }
        ids.AddRange(known);
    }

    /// <summary>Merges the symbols of a word, the pair of lowest rank first and the leftmost of equals.</summary>
    private int[] Merge(ReadOnlySpan<char> word)
    {
        var symbols = Symbols(word);
        var previous = Enumerable.Range(-1, symbols.Count).ToArray();
        var next = Enumerable.Range(1, symbols.Count).ToArray();
        var queue = new PriorityQueue<(int At, int Left, int Right), long>(symbols.Count);
        for (var at = 0; at + 1 < symbols.Count; at++)
            Offer(at);

        const int gone = -1;
        while (queue.TryDequeue(out var pair, out _))
        {
            var right = next[pair.At];
            // One of the two may have become part of another token since the pair was queued.
            if (symbols[pair.At] != pair.Left || right == symbols.Count || symbols[right] != pair.Right)
                continue;
            symbols[pair.At] = _merges[Pair(pair.Left, pair.Right)].Id;
            symbols[right] = gone;
            next[pair.At] = next[right];
            if (next[right] < symbols.Count)
                previous[next[right]] = pair.At;
            if (previous[pair.At] >= 0)
                Offer(previous[pair.At]);
            Offer(pair.At);
        }
        symbols.RemoveAll(id => id == gone);
        return [.. symbols];

        void Offer(int at)
        {
            if (next[at] < symbols.Count && _merges.TryGetValue(Pair(symbols[at], symbols[next[at]]), out var merge))
                queue.Enqueue((at, symbols[at], symbols[next[at]]), (long)merge.Rank << 32 | (uint)at);
        }
    }

    private List<int> Symbols(ReadOnlySpan<char> word)
    {
        var symbols = new List<int>(word.Length);
        var afterUnknown = false;
        Span<byte> utf8 = stackalloc byte[4];
        foreach (var rune in word.EnumerateRunes())
        {
            var unknown = false;
            if (_runes.TryGetValue(rune.Value, out var id))
                symbols.Add(id);
            else if (!AddBytes(utf8[..rune.EncodeToUtf8(utf8)], symbols))
            {
                unknown = true;
                if (_unknown is { } stand && !(afterUnknown && _fuseUnknown))
                    symbols.Add(stand);
            }
            afterUnknown = unknown;
        }
        return symbols;
    }

    private bool AddBytes(ReadOnlySpan<byte> utf8, List<int> symbols)
    {
        if (_bytes.Length == 0)
            return false;
        foreach (var value in utf8)
            if (_bytes[value] < 0)
                return false;
        foreach (var value in utf8)
            symbols.Add(_bytes[value]);
        return true;
    }

    private static long Pair(int left, int right) => (long)left << 32 | (uint)right;

    private static uint Chars(char left, char right) => (uint)left << 16 | right;
}
