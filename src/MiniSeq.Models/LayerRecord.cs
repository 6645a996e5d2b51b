using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>What the rows of one pass have in common.</summary>
/// <param name="Positions">[rows] int64.</param>
/// <param name="MaxLength">One more than the largest position.</param>
/// <param name="Rotary">Tables of the rotary embedding.</param>
/// <param name="ChunkRows">Rows of a mini-sequence.</param>
/// <param name="Dropout">All rows, for adapters with dropout; null drops nothing.</param>
internal sealed record RowContext(Tensor Positions, long MaxLength, RotaryEmbedding Rotary, long ChunkRows, DropoutRows? Dropout = null);

/// <summary>The rows of a batch that a layer's output is wanted of: the last ones of each document. Lives in the scope that makes it.</summary>
/// <param name="Rows">[wanted] int64, ascending.</param>
/// <param name="Lengths">How many of each document.</param>
internal sealed record WantedRows(Tensor Rows, IReadOnlyList<long> Lengths)
{
    /// <summary>Those from the first target of each document on; null where that is all of them.</summary>
    /// <param name="targets">Rows with a target, ascending [n] int64.</param>
    /// <param name="lengths">Rows of each document.</param>
    public static WantedRows? From(Tensor targets, IReadOnlyList<long> lengths)
    {
        long[] at = targets.cpu().data<long>().ToArray();
        var (wanted, counts) = (new List<long>(), new long[lengths.Count]);
        long start = 0;
        int next = 0;
        for (int i = 0; i < lengths.Count; i++)
        {
            long end = start + lengths[i];
            long first = next < at.Length && at[next] < end ? at[next] : end;
            for (long row = first; row < end; row++) wanted.Add(row);
            counts[i] = end - first;
            while (next < at.Length && at[next] < end) next++;
            start = end;
        }
        return wanted.Count == start ? null : new WantedRows(tensor(wanted.ToArray(), device: targets.device), counts);
    }

    /// <summary>Where the target rows are among the wanted, [n] int64.</summary>
    public Tensor Places(Tensor targets) => searchsorted(Rows, targets);
}

/// <summary>What a layer keeps from forward for backward: its input, and more where memory allows. Belongs to no dispose scope.</summary>
internal sealed class LayerRecord(Tensor input, RecomputePolicy policy) : IDisposable
{
    private readonly List<Tensor> _owned = [];

    public Tensor Input { get; private set; } = input.DetachFromDisposeScope();

    /// <summary>Output and log-sum-exp.</summary>
    public Attention.Result? Attention { get; private set; }

    /// <summary>Queries, keys and values after rotation, [rows, heads, D]; queries only of the rows that are wanted.</summary>
    public (Tensor Q, Tensor K, Tensor V)? Heads { get; private set; }

    /// <summary>r = x + W_o attention, [rows, d], of the rows that are wanted.</summary>
    public Tensor? Residual { get; private set; }

    /// <summary>Gate and up of the MLP, [rows, I], of the rows that are wanted.</summary>
    public (Tensor Gate, Tensor Up)? Mlp { get; private set; }

    public void KeepAttention(Attention.Result result)
    {
        if (policy != RecomputePolicy.Full) Attention = result.DetachFromDisposeScope();
    }

    public void KeepHeads(Tensor q, Tensor k, Tensor v)
    {
        if (policy == RecomputePolicy.None) Heads = (Own(q), Own(k), Own(v));
    }

    public void MakeRoom(long rows, long intermediate)
    {
        if (policy != RecomputePolicy.None) return;
        Tensor Room(long width) => Own(empty([rows, width], Input.dtype, Input.device));
        (Residual, Mlp) = (Room(Input.size(1)), (Room(intermediate), Room(intermediate)));
    }

    /// <summary>Moves the input out of memory, until <see cref="Restore"/>; null leaves it.</summary>
    public void Offload(OffloadStore? store)
    {
        store?.Push(Input);
        if (store is not null) Input.Dispose();
    }

    /// <summary>Brings it back from the same store.</summary>
    public void Restore(OffloadStore? store)
    {
        if (store is not null) Input = store.Pop().DetachFromDisposeScope();
    }

    public void Dispose()
    {
        Input.Dispose();
        foreach (var t in _owned) t.Dispose();
        Attention?.Dispose();
    }

    private Tensor Own(Tensor t)
    {
        _owned.Add(t.DetachFromDisposeScope());
        return t;
    }
}
