using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>One document as token ids, with the label wanted for each of them.</summary>
/// <param name="InputIds">The tokens.</param>
/// <param name="Labels">As in Hugging Face: labels[t] is the token at t itself if its prediction counts, else −100; the shift by one is done by the model.</param>
public sealed record TokenSequence(long[] InputIds, long[] Labels)
{
    /// <summary>A document every token of which is to be predicted, but the first.</summary>
    public TokenSequence(long[] inputIds) : this(inputIds, inputIds)
    {
    }

    /// <summary>Tokens in all.</summary>
    public int Length => InputIds.Length;

    /// <summary>Labels that count: the first token is predicted by none.</summary>
    public long TargetCount => Labels.Skip(1).Count(l => l != LinearCrossEntropy.IgnoreIndex);
}

/// <summary>
/// A micro-batch of whole documents laid end to end: no padding. Positions start anew in each, attention stays within each, and the
/// last token of a document predicts nothing, so a document's loss does not depend on its neighbours.
/// </summary>
public sealed class TokenBatch : IDisposable
{
    /// <summary>Packs documents.</summary>
    /// <exception cref="ArgumentException">No document, an empty one, or labels of another length.</exception>
    public TokenBatch(IReadOnlyList<TokenSequence> documents, Device? device = null)
    {
        if (documents.Count == 0) throw new ArgumentException("A batch needs at least one document.", nameof(documents));
        foreach (var d in documents)
            if (d.Length == 0 || d.Labels.Length != d.Length)
                throw new ArgumentException($"A document needs at least one token and as many labels: it has {d.Length} tokens and {d.Labels.Length} labels.", nameof(documents));
        Lengths = [.. documents.Select(d => (long)d.Length)];
        TargetCount = documents.Sum(d => d.TargetCount);
        InputIds = Rows(documents, d => d.InputIds, device);
        Positions = Rows(documents, d => [.. Enumerable.Range(0, d.Length).Select(i => (long)i)], device);
        Targets = Rows(documents, d => [.. d.Labels.Skip(1), LinearCrossEntropy.IgnoreIndex], device);
    }

    /// <summary>[rows] int64.</summary>
    public Tensor InputIds { get; }

    /// <summary>[rows] int64: place of each token in its document.</summary>
    public Tensor Positions { get; }

    /// <summary>[rows] int64: the next token where its prediction counts, else −100.</summary>
    public Tensor Targets { get; }

    /// <summary>Tokens of each document.</summary>
    public IReadOnlyList<long> Lengths { get; }

    /// <summary>Targets that are not ignored.</summary>
    public long TargetCount { get; }

    /// <summary>Tokens in all.</summary>
    public long RowCount => InputIds.size(0);

    /// <inheritdoc/>
    public void Dispose()
    {
        InputIds.Dispose();
        Positions.Dispose();
        Targets.Dispose();
    }

    private static Tensor Rows(IReadOnlyList<TokenSequence> documents, Func<TokenSequence, long[]> part, Device? device) =>
        tensor((long[])[.. documents.SelectMany(part)], device: device).DetachFromDisposeScope();
}
