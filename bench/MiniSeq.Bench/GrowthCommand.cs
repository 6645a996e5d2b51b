using System.CommandLine;

namespace MiniSeq.Bench;

/// <summary>The command <c>growth</c>.</summary>
internal sealed class GrowthCommand
{
    private const double LongSeconds = 30; // of a step: the next length's then need no step before it

    private static readonly Shape s_small = new() { Hidden = 512, Intermediate = 2048, Layers = 4, Heads = 8, KvHeads = 8, Vocab = 32000 };

    private readonly ModelOptions _model = new(s_small, "bfloat16");
    private readonly Option<int[]> _lengths = new("--lengths") { DefaultValueFactory = _ => [1024, 2048, 4096, 8192, 16384, 32768, 65536], AllowMultipleArgumentsPerToken = true, Description = "tokens of a document, ascending" };
    private readonly Option<int> _limit = Options.Number("--limit-mb", 8192, "a variant ends before the length whose peak would be beyond this, as predicted from the length before");
    private readonly Option<int> _steps = Options.Number("--steps", 1, "steps timed at each length");
    private readonly Option<string> _optimizer = new("--optimizer") { DefaultValueFactory = _ => "adamw", Description = "adamw, or none: forward and backward only" };
    private readonly Option<FileInfo?> _png = new("--png") { Description = "draw memory and speed over the length into this file" };
    private readonly Option<FileInfo?> _json = Options.Json();

    private GrowthCommand() => _lengths.Validators.Add(r => { if (r.GetValueOrDefault<int[]>() is not { Length: > 0 } lengths || lengths.Any(l => l < 2)) r.AddError("--lengths must be 2 or more."); });

    public static Command Create()
    {
        var it = new GrowthCommand();
        var command = new Command("growth", """
            Tokens a second and peak memory (of tensors, beyond weights, gradients and optimizer state) of a training step as the document grows, each
            variant and length in a process of its own. After a step of half a minute the next length is timed without one before it.
            """) { it._lengths, it._limit, it._steps, it._optimizer, it._png, it._json };
        it._model.AddTo(command, it._model.VariantNames, it._model.Lora);
        command.SetAction(it.Run);
        return command;
    }

    /// <summary>A variant at a length.</summary>
    internal sealed record Point(string Name, string DType, int Seq, double TokensPerSecond, long PeakTensorBytes, double Seconds);

    private void Run(ParseResult p)
    {
        List<Point> points = [];
        foreach (int seq in p.GetValue(_lengths)!.Order())
            foreach (string dtype in _model.DTypes(p))
                foreach (var variant in _model.Variants(p))
                    if (Measure(p, seq, variant, dtype, points) is { } point) points.Add(point);
        Print(points);
        var json = Report.Json(new { shape = _model.Shape(p), device = Report.Device(), limitMb = p.GetValue(_limit), points = points.Select(m => new { m.Name, dtype = m.DType, m.Seq, m.TokensPerSecond, m.PeakTensorBytes, m.Seconds }) });
        Report.Write(p.GetValue(_json), json);
        if (p.GetValue(_png) is { } png) GrowthChart.Save(points, png.FullName);
    }

    private Point? Measure(ParseResult p, int seq, Variant variant, string dtype, List<Point> points)
    {
        string name = Shape.Name(variant);
        var before = points.LastOrDefault(b => b.Name == name && b.DType == dtype);
        // In a straight line from there: at short lengths more than it will be.
        if (before?.PeakTensorBytes * (double)seq / before?.Seq > (double)p.GetValue(_limit) * (1 << 20)) return null;
        var outcome = Worker.Start(new Order("step", _model.Shape(p) with { Seq = seq }, variant, dtype, p.GetValue(_steps), p.GetValue(_optimizer) != "none", 0,
            _model.LeastCompute(p, null), p.GetValue(_model.Threads), WarmUp: !(before?.Seconds > LongSeconds)));
        double seconds = Report.Median(outcome.Seconds);
        Console.Error.WriteLine($"{seq} tokens: {name} {dtype} {Report.Cell(seconds, 2)} s, {Report.Megabytes(outcome.PeakTensorBytes)} MB");
        return new Point(name, dtype, seq, Math.Round(seq * (double)_model.Shape(p).Batch / seconds, 2), outcome.PeakTensorBytes, seconds);
    }

    // A line for each length: memory of all variants, then their speed.
    private static void Print(List<Point> points)
    {
        string[] forms = [.. points.Select(Form).Distinct()];
        Report.Table(["tokens", .. forms.Select(f => f + ", MB"), .. forms.Select(f => f + ", tokens/s")], points.GroupBy(p => p.Seq).Select(length =>
        {
            Point? Of(string form) => length.FirstOrDefault(p => Form(p) == form);
            return (string[])[Report.Cell(length.Key), .. forms.Select(f => Of(f) is { } p ? Report.Megabytes(p.PeakTensorBytes) : "-"), .. forms.Select(f => Report.Cell(Of(f)?.TokensPerSecond, 1))];
        }));
    }

    /// <summary>What a line of the table and of the picture is called.</summary>
    internal static string Form(Point point) => $"{point.Name} ({point.DType})";
}
