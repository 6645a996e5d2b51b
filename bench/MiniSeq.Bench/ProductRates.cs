using System.Diagnostics;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>How fast the matrix products of a model can be on this machine: what a step's rate is held against.</summary>
internal static class ProductRates
{
    private static readonly TimeSpan s_enough = TimeSpan.FromSeconds(0.5);
    private const int MostRuns = 8;

    /// <summary>The best of forward, dX and dW of the MLP and the head at several rows: FLOP/s in 10^9, and which product it was.</summary>
    public static (double Gflops, string Name) Fastest(Shape shape, ScalarType dtype)
    {
        using var noGrad = no_grad();
        (double Gflops, string Name) best = default;
        foreach (var (name, columns, counts) in new[] { ("MLP", shape.Intermediate, new[] { 256, 512, 1024, 2048 }), ("head", shape.Vocab, [256, 1024]) })
        {
            using var scope = NewDisposeScope();
            var w = rand(columns, shape.Hidden).to(dtype);
            foreach (int rows in counts)
            {
                var (x, dy) = (rand(rows, shape.Hidden).to(dtype), rand(rows, columns).to(dtype));
                foreach (var (kind, product) in new (string, Func<Tensor>)[] { ("forward", () => nn.functional.linear(x, w)), ("dX", () => dy.mm(w)), ("dW", () => dy.t().mm(x)) })
                {
                    double gflops = 2.0 * rows * columns * shape.Hidden / Shortest(product) / 1e9;
                    if (gflops > best.Gflops) best = (gflops, $"{name} {kind}, {rows} rows");
                }
            }
        }
        return best;
    }

    private static double Shortest(Func<Tensor> product)
    {
        double best = double.MaxValue;
        var all = Stopwatch.StartNew();
        for (int i = 0; i <= MostRuns && (i < 2 || all.Elapsed < s_enough); i++)
        {
            using var scope = NewDisposeScope();
            var clock = Stopwatch.StartNew();
            product();
            if (i > 0) best = Math.Min(best, clock.Elapsed.TotalSeconds); // the first makes code, threads and heap
        }
        return best;
    }
}
