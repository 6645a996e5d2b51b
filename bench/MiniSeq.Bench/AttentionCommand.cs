using System.CommandLine;
using System.Text.Json.Nodes;
using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>The command <c>attention</c>.</summary>
internal sealed class AttentionCommand
{
    private const double BackwardProducts = 2.5; // five products for forward's two: the scores again, dV, dP, dQ, dK

    private readonly Option<int> _seq = Options.Number("--seq", 16384, "tokens");
    private readonly Option<int> _heads = Options.Number("--heads", 8, "query heads");
    private readonly Option<int> _kvHeads = Options.Number("--kv-heads", 8, "key/value heads; repeated for the built-in kernel, before the clock starts");
    private readonly Option<int> _headDim = Options.Number("--head-dim", 64, "columns of a head");
    private readonly Option<string> _dtype = Options.DType("float32");
    private readonly Option<int> _rounds = Options.Rounds();
    private readonly Option<int> _threads = Options.Threads();
    private readonly Option<FileInfo?> _json = Options.Json();

    public static Command Create()
    {
        var it = new AttentionCommand();
        var command = new Command("attention", """
            Causal attention, forward and backward: this library's against libtorch's scaled_dot_product_attention, taking turns; medians.
            FLOP/s count 2 products over half of the scores forward, 4 S^2/2 heads head_dim, and 5 such products backward, the scores again among them.
            Peak memory is beyond q, k, v and the output's gradient.
            """) { it._seq, it._heads, it._kvHeads, it._headDim, it._dtype, it._rounds, it._threads, it._json };
        command.SetAction(it.Run);
        return command;
    }

    private void Run(ParseResult p)
    {
        Turns.Prepare(p.GetValue(_threads));
        int seq = p.GetValue(_seq), heads = p.GetValue(_heads), kvHeads = p.GetValue(_kvHeads), headDim = p.GetValue(_headDim);
        if (heads % kvHeads != 0) throw new ArgumentException($"--kv-heads {kvHeads} does not divide --heads {heads}.");
        var dtype = Shape.ParseDType(p.GetValue(_dtype)!);
        using var scope = NewDisposeScope();
        random.manual_seed(1);
        Tensor Random(int columns) => randn(seq, columns, headDim).to(dtype);
        var kernels = new Kernels(Random(heads), Random(kvHeads), Random(kvHeads), Random(heads));
        var measured = Turns.Run(p.GetValue(_rounds), kernels.Ours, kernels.BuiltIn);
        double gflop = 2.0 * seq * seq * heads * headDim / 1e9;
        JsonObject[] results = [Result("mini-sequence", measured[0], gflop), Result("built-in", measured[1], gflop)];
        Report.Table([" attention", "forward ms", "GFLOP/s", "backward ms", "GFLOP/s", "both ms", "peak tensors MB"], results.Select(r => new[]
        {
            $"{r["name"]}", Report.Cell(r["forwardMs"], 1), Report.Cell(r["forwardGflops"]), Report.Cell(r["backwardMs"], 1), Report.Cell(r["backwardGflops"]),
            Report.Cell(r["ms"], 1), Report.Cell(r["peakTensorBytes"], 1, 1 << 20),
        }));
        var ratios = new JsonObject();
        foreach (string figure in new[] { "forwardMs", "backwardMs", "ms", "peakTensorBytes" })
            ratios[$"{figure}: mini-sequence / built-in"] = Math.Round(Report.Number(results[0][figure]!) / Report.Number(results[1][figure]!), 3);
        foreach (var (name, ratio) in ratios) Console.WriteLine($"{name}: {ratio}");
        Console.WriteLine($"largest difference, of output and gradients, over the largest entry: {kernels.LargestDifference():0.0E+0}");
        Report.Write(p.GetValue(_json), Report.Json(new { seq, heads, kvHeads, headDim, dtype = Shape.Name(dtype), device = Report.Device(), threads = get_num_threads(), kernels = results, ratios }));
    }

    private static JsonObject Result(string name, Turns.Measured measured, double gflop) => new()
    {
        ["name"] = name,
        ["forwardMs"] = measured.Seconds[0] * 1e3,
        ["backwardMs"] = measured.Seconds[1] * 1e3,
        ["ms"] = measured.Seconds.Sum() * 1e3,
        ["forwardGflops"] = gflop / measured.Seconds[0],
        ["backwardGflops"] = BackwardProducts * gflop / measured.Seconds[1],
        ["peakTensorBytes"] = measured.PeakBytes,
    };

    /// <summary>The two over the same q, k, v [S, heads, D].</summary>
    private sealed class Kernels(Tensor q, Tensor k, Tensor v, Tensor dOutput)
    {
        private readonly long[] _lengths = [q.size(0)];
        private readonly double _scale = 1 / Math.Sqrt(q.size(2));
        private readonly (Tensor Q, Tensor K, Tensor V, Tensor DOutput) _heads = (Heads(q), Heads(Repeated(k, q)), Heads(Repeated(v, q)), Heads(dOutput));
        private Tensor[] _ours = [];
        private Tensor[] _builtIn = [];

        public double[] Ours()
        {
            Attention.Result? forward = null;
            Tensor? dq = null, dk = null, dv = null;
            double[] seconds =
            [
                Turns.Seconds(() => forward = Attention.Forward(q, k, v, _lengths, _scale)),
                Turns.Seconds(() => (dq, dk, dv) = Attention.Backward(dOutput, q, k, v, forward!, _lengths, _scale)),
            ];
            if (_ours.Length == 0) _ours = Kept(Heads(forward!.Output), Heads(dq!), Heads(dk!), Heads(dv!));
            return seconds;
        }

        public double[] BuiltIn()
        {
            Tensor[] leaves = [.. new[] { _heads.Q, _heads.K, _heads.V }.Select(t => t.detach().requires_grad_())];
            Tensor? output = null;
            double[] seconds =
            [
                Turns.Seconds(() => output = nn.functional.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_casual: true)),
                Turns.Seconds(() => autograd.backward([output!], [_heads.DOutput])),
            ];
            if (_builtIn.Length == 0) _builtIn = Kept(output!.detach(), leaves[0].grad!, Summed(leaves[1].grad!, k), Summed(leaves[2].grad!, v));
            return seconds;
        }

        public double LargestDifference()
        {
            using var scope = NewDisposeScope();
            return _ours.Zip(_builtIn, (a, b) => ((a - b).abs().max() / b.abs().max()).to(ScalarType.Float64).item<double>()).Max();
        }

        // Only the first round's, which does not count: more copies would be in the peak.
        private static Tensor[] Kept(params Tensor[] results) => [.. results.Select(t => t.DetachFromDisposeScope())];

        private static Tensor Heads(Tensor rows) => rows.unsqueeze(0).transpose(1, 2);

        private static Tensor Repeated(Tensor rows, Tensor q) => q.size(1) == rows.size(1) ? rows : rows.repeat_interleave(q.size(1) / rows.size(1), 1);

        // The gradient of a repeated head is the sum of its copies'.
        private static Tensor Summed(Tensor gradient, Tensor rows) => gradient.view(1, rows.size(1), -1, rows.size(0), rows.size(2)).sum(2);
    }
}
