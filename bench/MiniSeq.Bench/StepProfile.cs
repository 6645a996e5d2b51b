using System.Diagnostics;
using MiniSeq.Models;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>
/// Where the time of a training step of mini-sequence goes. Zeroing, clipping and the optimizer are timed in the step itself. What forward and
/// backward consist of is timed alone, at the shapes of the step's mini-sequences, and multiplied by how often the step does it.
/// </summary>
internal sealed class StepProfile : IDisposable
{
    /// <summary>A line of the table.</summary>
    internal sealed record Part(string Name, double Calls, double Seconds, double Flops);

    /// <summary>What was measured.</summary>
    internal sealed record Result(IReadOnlyList<Part> Parts, double StepSeconds, double AloneSeconds, double PageFaults, double SecondsOfAFault, long ChunkRows, long LogitRows, IReadOnlyList<string> Policies);

    private const string Rest = "rest of forward and backward";

    private readonly Shape _shape;
    private readonly StepRunner _runner;
    private readonly IReadOnlyList<TokenSequence> _documents;
    private readonly MemoryPlan _plan;
    private readonly StepPieces _pieces;
    private readonly List<(double Zero, double ForwardBackward, double Clip, double Update, double Faults)> _steps = [];

    public StepProfile(Shape shape, ScalarType dtype, ComputeOptions compute)
    {
        _shape = shape;
        _runner = new StepRunner(shape, Variant.MiniSequence, dtype, optimizer: true, compute);
        _documents = shape.Documents(shape.Seq);
        _plan = new MemoryPlan(shape.Config, (long)shape.Seq * shape.Batch, _documents.Sum(d => d.TargetCount), dtype, compute);
        _pieces = new StepPieces(shape, _runner.Model, _plan, _documents);
    }

    public Result Run(int rounds)
    {
        Step(); // code, threads and heap
        _steps.Clear();
        for (int round = 0; round < rounds; round++)
        {
            Step();
            _pieces.Time();
            Console.Error.WriteLine($"round {round + 1}/{rounds}");
        }
        double Median(Func<(double Zero, double ForwardBackward, double Clip, double Update, double Faults), double> part) => Report.Median(_steps.Select(part));
        var parts = _pieces.Parts();
        double alone = parts.Sum(p => p.Seconds), whole = Median(s => s.ForwardBackward);
        Part[] others = [new(Rest, 0, whole - alone, 0), new("zeroing of gradients", 1, Median(s => s.Zero), 0), new("clipping", 1, Median(s => s.Clip), 0), new("optimizer", 1, Median(s => s.Update), 0)];
        return new Result([.. parts, .. others], others.Sum(p => p.Seconds) + alone, alone, Median(s => s.Faults), SecondsOfAFault(), _plan.ChunkRows, _plan.LogitRows,
            [.. _plan.Layers.Select(l => l.ToString())]);
    }

    // As the training loop makes it.
    private void Step()
    {
        long faults = PageFaults();
        double zero = Turns.Seconds(_runner.ZeroGradients), forwardBackward = Turns.Seconds(() => _runner.ForwardBackward(_documents));
        double clip = Turns.Seconds(_runner.Clip), update = Turns.Seconds(_runner.Update);
        _steps.Add((zero, forwardBackward, clip, update, PageFaults() - faults));
    }

    // Minor faults of the process so far: field 10, counted from the third behind the name, which is in parentheses.
    private static long PageFaults()
    {
        const string Stat = "/proc/self/stat";
        if (!File.Exists(Stat)) return 0;
        string stat = File.ReadAllText(Stat);
        return long.Parse(stat[(stat.LastIndexOf(')') + 2)..].Split(' ')[7], System.Globalization.CultureInfo.InvariantCulture);
    }

    private static double SecondsOfAFault()
    {
        const int Bytes = 256 << 20, Page = 4096;
        long before = PageFaults();
        byte[] fresh = GC.AllocateUninitializedArray<byte>(Bytes);
        var clock = Stopwatch.StartNew();
        for (int i = 0; i < Bytes; i += Page) fresh[i] = 1;
        double seconds = clock.Elapsed.TotalSeconds;
        long faults = PageFaults() - before;
        GC.KeepAlive(fresh);
        return faults > 0 ? seconds / faults : double.NaN;
    }

    public void Dispose()
    {
        _pieces.Dispose();
        _runner.Dispose();
    }
}
