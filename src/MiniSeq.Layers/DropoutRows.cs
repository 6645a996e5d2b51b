using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// Which rows of which pass a dropout mask is for. An element's mask is a function of (seed, module, row, column) alone: it is the same
/// in forward and in recomputation, on every device and however the rows are cut into mini-sequences.
/// </summary>
/// <param name="Seed">One for a forward and its backward.</param>
/// <param name="FirstRow">The number, among all rows of the pass, of the first row at hand.</param>
public readonly record struct DropoutRows(long Seed, long FirstRow)
{
    private const long BlockRows = 64; // of a mask at once: it stays in the cache

    /// <summary>A pass with a seed of its own, from torch's random state.</summary>
    public static DropoutRows NewPass()
    {
        using var drawn = randint(long.MaxValue, 1L, ScalarType.Int64);
        return new DropoutRows(drawn.item<long>(), 0);
    }

    /// <summary>The rows from the <paramref name="start"/>-th of these on.</summary>
    public DropoutRows From(long start) => this with { FirstRow = FirstRow + start };

    /// <summary>x ⊙ mask in place: an element becomes 0 with probability p. The others are not divided by 1 − p here.</summary>
    /// <param name="x">[rows, columns].</param>
    /// <param name="p">Probability, in [0, 1).</param>
    /// <param name="module">A number of its own for each module that drops.</param>
    public void Mask_(Tensor x, double p, long module)
    {
        using var scope = NewDisposeScope();
        ulong key = Mix(Mix((ulong)Seed) + (ulong)module);
        var columns = Keys(Mix(key + 1), 0, x.size(1), x.device);
        var least = tensor((int)Math.Round((p - 0.5) * uint.MaxValue), device: x.device);
        long first = FirstRow;
        Chunking.ForEach(x.size(0), BlockRows, (start, count) =>
        {
            // Two random keys by exclusive or, then z (2z + 1) mod 2³²: a bijection whose high bits depend on all bits (RC6).
            var z = Keys(key, first + start, count, x.device).unsqueeze(1).bitwise_xor(columns);
            z.mul_(z.mul(2).add_(1));
            x.narrow(0, start, count).mul_(z.ge(least));
        });
    }

    private static Tensor Keys(ulong seed, long first, long count, Device device)
    {
        var keys = new int[count];
        for (long i = 0; i < count; i++) keys[i] = (int)Mix(seed + (ulong)(first + i));
        return tensor(keys, device: device);
    }

    // SplitMix64.
    private static ulong Mix(ulong x)
    {
        x += 0x9E3779B97F4A7C15;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
        return x ^ (x >> 31);
    }
}
