using MiniSeq.Layers;
using MiniSeq.Models;

namespace MiniSeq.Training;

/// <summary>
/// Turns a document and its target text into tokens: bos, the template around the document, the target, eos. A document that is too
/// long is cut at its end; the target never is.
/// </summary>
public sealed class DocumentEncoder
{
    /// <summary>Where the document goes in a prompt template.</summary>
    public const string InputPlaceholder = "{input}";

    private readonly HuggingFaceTokenizer _tokenizer;
    private readonly int[] _before;
    private readonly int[] _after;
    private readonly int _maxLength;
    private int _truncated;

    /// <summary>An encoder.</summary>
    /// <param name="tokenizer">The model's own.</param>
    /// <param name="promptTemplate">Text with <see cref="InputPlaceholder"/> once; the target follows it.</param>
    /// <param name="maxLength">The most tokens of a sequence, prompt, target and eos together.</param>
    /// <exception cref="ArgumentException">The template lacks the placeholder or holds it twice, or the length leaves no room for a document.</exception>
    public DocumentEncoder(HuggingFaceTokenizer tokenizer, string promptTemplate, int maxLength)
    {
        string[] parts = promptTemplate.Split(InputPlaceholder);
        if (parts.Length != 2) throw new ArgumentException($"The prompt template must hold {InputPlaceholder} once; it is \"{promptTemplate}\".", nameof(promptTemplate));
        _tokenizer = tokenizer;
        _before = WithBos(Ids(parts[0]));
        _after = Ids(parts[1]);
        _maxLength = maxLength;
        if (maxLength <= _before.Length + _after.Length + 1)
            throw new ArgumentException($"A maximum length of {maxLength} tokens leaves no room for a document: the prompt template alone takes {_before.Length + _after.Length}.", nameof(maxLength));
    }

    /// <summary>Documents cut so far.</summary>
    public int TruncatedCount => _truncated;

    /// <summary>A training example: loss on the target and eos only (<paramref name="completionOnlyLoss"/>), or on everything.</summary>
    /// <param name="document">Any text.</param>
    /// <param name="target">What the model is to write after the prompt; null for a text that is itself what to learn, without template.</param>
    /// <param name="completionOnlyLoss">Whether the prompt is masked.</param>
    /// <exception cref="SequenceTooLongException">The target does not fit beside the template.</exception>
    public TokenSequence Encode(string document, string? target, bool completionOnlyLoss = true)
    {
        if (target is null) return EncodeText(document);
        int[] completion = WithEos(Ids(target));
        int[] prompt = Prompt(document, completion.Length);
        long[] ids = [.. prompt.Concat(completion).Select(i => (long)i)];
        long[] labels = [.. ids];
        if (completionOnlyLoss) labels.AsSpan(0, prompt.Length).Fill(LinearCrossEntropy.IgnoreIndex);
        return new TokenSequence(ids, labels);
    }

    /// <summary>The prompt of a document, with room for <paramref name="reserve"/> tokens after it.</summary>
    /// <exception cref="SequenceTooLongException">The reserve leaves no room.</exception>
    public int[] Prompt(string document, int reserve)
    {
        int room = _maxLength - _before.Length - _after.Length - reserve;
        if (room < 0) throw new SequenceTooLongException($"{reserve} tokens after the prompt and {_before.Length + _after.Length} of the template do not fit into the maximum length of {_maxLength}; the target is never cut, so raise it.");
        return [.. _before, .. Cut(Ids(document), room), .. _after];
    }

    private TokenSequence EncodeText(string text)
    {
        int[] ids = Cut(WithEos(WithBos(Ids(text))), _maxLength);
        return new TokenSequence([.. ids.Select(i => (long)i)]);
    }

    private int[] Cut(int[] ids, int room)
    {
        if (ids.Length <= room) return ids;
        Interlocked.Increment(ref _truncated);
        return ids[..room];
    }

    private int[] WithBos(int[] ids) => _tokenizer.BosTokenId is { } bos ? [bos, .. ids] : ids;

    private int[] WithEos(int[] ids) => _tokenizer.EosTokenId is { } eos ? [.. ids, eos] : ids;

    private int[] Ids(string text) => text.Length == 0 ? [] : [.. _tokenizer.Encode(text, addSpecialTokens: false)];
}
