using System.CommandLine;

namespace MiniSeq.Bench;

/// <summary>The command <c>profile</c>.</summary>
internal sealed class ProfileCommand
{
    private readonly ModelOptions _model = new(ModelOptions.DefaultShape, "bfloat16");
    private readonly Option<int> _rounds = Options.Rounds();
    private readonly Option<FileInfo?> _json = Options.Json();

    public static Command Create()
    {
        var it = new ProfileCommand();
        var command = new Command("profile", """
            Where the time of a training step of mini-sequence goes: zeroing, forward and backward, clipping to norm 1 and AdamW, as in the training loop.
            The parts of forward and backward are timed alone, at the shapes of the step's mini-sequences, and multiplied by how often the step does them;
            the rest is what the measured step takes beyond their sum: calls into libtorch, allocation, caches that hold less than when a part runs
            alone. Steps and parts take turns; medians. FLOP/s of attention are counted as by the command attention, those of the step as for mfu by step.
            """) { it._rounds, it._json };
        it._model.AddTo(command, it._model.Seq);
        command.SetAction(it.Run);
        return command;
    }

    private void Run(ParseResult p)
    {
        Turns.Prepare(p.GetValue(_model.Threads));
        if (_model.DTypes(p) is not [var dtype]) throw new ArgumentException("profile takes one --dtype.");
        using var profile = new StepProfile(_model.Shape(p), Shape.ParseDType(dtype), _model.Compute(p));
        var result = profile.Run(p.GetValue(_rounds));
        string[] Row(string name, double? calls, double seconds, double flops) =>
            [name, Report.Cell(calls), Report.Cell(seconds * 1e3, 1), Report.Cell(100 * seconds / result.StepSeconds, 1) + "%", Report.Cell(flops > 0 ? flops / seconds / 1e9 : null)];
        Report.Table([" part", "calls", "ms", "share", "GFLOP/s"],
            [.. result.Parts.Select(part => Row(part.Name, part.Calls > 0 ? Math.Ceiling(part.Calls) : null, part.Seconds, part.Flops)), Row("the step, measured", 1, result.StepSeconds, ModelFlops.Of(_model.Shape(p)))]);
        Console.WriteLine($"parts of forward and backward, timed alone: {Report.Cell(result.AloneSeconds * 1e3, 1)} ms");
        Console.WriteLine($"page faults: {Report.Cell(result.PageFaults)} in a step, about {Report.Cell(result.PageFaults * result.SecondsOfAFault * 1e3, 1)} ms of it at {Report.Cell(result.SecondsOfAFault * 1e6, 2)} µs each");
        Console.WriteLine($"mini-sequences of {result.ChunkRows} rows, {result.LogitRows} in the head; the layers recompute: {string.Join(' ', result.Policies)}");
        Report.Write(p.GetValue(_json), Report.Json(new { Shape = _model.Shape(p), dtype, Device = Report.Device(), Threads = TorchSharp.torch.get_num_threads(), Result = result }));
    }
}
