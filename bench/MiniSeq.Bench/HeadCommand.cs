using System.CommandLine;
using System.Text.Json.Nodes;
using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>The command <c>head</c>.</summary>
internal sealed class HeadCommand
{
    private static readonly string[] s_names = ["mini-sequence", "bare products", "plain"];

    private readonly Option<int> _seq = Options.Number("--seq", 2048, "rows, each with a label");
    private readonly Option<int> _vocab = Options.Number("--vocab", 128256, "vocabulary size");
    private readonly Option<int> _hidden = Options.Number("--hidden", 2048, "hidden size");
    private readonly Option<string> _dtype = Options.DType("bfloat16");
    private readonly Option<int> _chunk = Options.Chunk();
    private readonly Option<int> _rounds = Options.Rounds();
    private readonly Option<int> _threads = Options.Threads();
    private readonly Option<FileInfo?> _json = Options.Json();

    public static Command Create()
    {
        var it = new HeadCommand();
        var command = new Command("head", """
            LM head and loss, forward and backward: LinearCrossEntropy in mini-sequences, the bare matrix products of the same mini-sequences (logits, dX,
            and dW in its own type, not added up) and cross_entropy(linear), taking turns; medians. Memory is beyond inputs, weights and gradients; at
            4 S it is from one run, and a dash where plain would not fit.
            """) { it._seq, it._vocab, it._hidden, it._dtype, it._chunk, it._rounds, it._threads, it._json };
        command.SetAction(it.Run);
        return command;
    }

    private void Run(ParseResult p)
    {
        Turns.Prepare(p.GetValue(_threads));
        int seq = p.GetValue(_seq), vocab = p.GetValue(_vocab), hidden = p.GetValue(_hidden);
        var dtype = Shape.ParseDType(p.GetValue(_dtype)!);
        using var scope = NewDisposeScope();
        random.manual_seed(1);
        using var head = new Projection(hidden, vocab, dtype: dtype);
        using (var gradient = zeros(head.Weight.shape, Gradients.AccumulationType(dtype))) head.Weight.grad = gradient;
        long chunk = Chunking.LogitRows(p.GetValue(_chunk), seq, vocab, dtype);
        var measured = Measure(head, seq, chunk, p.GetValue(_rounds), withPlain: true);
        var longer = Measure(head, 4 * seq, chunk, 0, withPlain: 5 * measured[2].PeakBytes < TensorMemory.AvailableBytes);
        double gflop = 3 * 2.0 * seq * vocab * hidden / 1e9;
        JsonObject[] results = [.. measured.Select((m, i) => new JsonObject
        {
            ["name"] = s_names[i],
            ["ms"] = m.Seconds[0] * 1e3,
            ["overBareProducts"] = Math.Round(m.Seconds[0] / measured[1].Seconds[0], 3),
            ["gflops"] = gflop / m.Seconds[0],
            ["extraBytes"] = m.PeakBytes,
            ["extraBytesAt4Seq"] = i < longer.Length ? longer[i].PeakBytes : null,
        })];
        Report.Table([" head and loss", "ms", "over bare products", "GFLOP/s", $"extra MB at {seq} rows", $"at {4 * seq}"], results.Select(r => new[]
        {
            $"{r["name"]}", Report.Cell(r["ms"], 1), Report.Cell(r["overBareProducts"], 2), Report.Cell(r["gflops"]), Report.Cell(r["extraBytes"], 1, 1 << 20), Report.Cell(r["extraBytesAt4Seq"], 1, 1 << 20),
        }));
        Console.WriteLine($"mini-sequences of {chunk} rows; the logits of one take {chunk * vocab * head.Weight.element_size() >> 20} MB");
        Report.Write(p.GetValue(_json), Report.Json(new { seq, vocab, hidden, dtype = Shape.Name(dtype), chunkRows = chunk, device = Report.Device(), threads = get_num_threads(), forms = results }));
    }

    private static Turns.Measured[] Measure(Projection head, int rows, long chunk, int rounds, bool withPlain)
    {
        using var scope = NewDisposeScope();
        var x = randn(rows, head.Weight.size(1)).to(head.Weight.dtype);
        var labels = randint(0, head.Weight.size(0), [rows], dtype: ScalarType.Int64);
        var dx = zeros_like(x);
        double[] MiniSequence() => [Turns.Seconds(() => Chunks(rows, chunk, (start, count) =>
        {
            var (_, part) = LinearCrossEntropy.Chunk(x.narrow(0, start, count), head, labels.narrow(0, start, count), 1.0 / rows);
            dx.narrow(0, start, count).copy_(part!);
        }))];
        double[] Bare() => [Turns.Seconds(() => Chunks(rows, chunk, (start, count) =>
        {
            var part = x.narrow(0, start, count);
            var logits = nn.functional.linear(part, head.Weight);
            logits.mm(head.Weight);
            logits.t().mm(part);
        }))];
        double[] Plain() => [Turns.Seconds(() =>
        {
            var leaf = x.detach().requires_grad_();
            leaf.grad = dx;
            var logits = nn.functional.linear(leaf, head.Weight).to(Gradients.AccumulationType(x.dtype));
            (nn.functional.cross_entropy(logits, labels, reduction: nn.Reduction.Sum) / rows).backward();
        })];
        return Turns.Run(rounds, withPlain ? [MiniSequence, Bare, Plain] : [MiniSequence, Bare]);
    }

    private static void Chunks(long rows, long chunk, Action<long, long> body)
    {
        using var noGrad = no_grad();
        Chunking.ForEach(rows, chunk, body);
    }
}
