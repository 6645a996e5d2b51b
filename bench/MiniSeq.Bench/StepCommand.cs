using System.CommandLine;
using System.Text.Json.Nodes;

namespace MiniSeq.Bench;

/// <summary>The command <c>step</c>.</summary>
internal sealed class StepCommand
{
    private readonly ModelOptions _model = new(ModelOptions.DefaultShape, "float32");
    private readonly Option<int> _rounds = Options.Rounds();
    private readonly Option<int> _steps = Options.Number("--steps", 2, "steps timed in a turn, after one that is not");
    private readonly Option<string> _optimizer = new("--optimizer") { DefaultValueFactory = _ => "adamw", Description = "adamw, or none: forward and backward only" };
    private readonly Option<FileInfo?> _json = Options.Json();

    public static Command Create()
    {
        var it = new StepCommand();
        var command = new Command("step", $"""
            Tokens a second, model FLOPs utilisation and peak memory of a training step: plain, recompute, mini-sequence, taking turns, each turn in a
            process of its own; medians over all turns.

            {ModelFlops.Formula}
            """) { it._rounds, it._steps, it._optimizer, it._json };
        it._model.AddTo(command, it._model.Seq, it._model.VariantNames, it._model.Lora);
        command.SetAction(it.Run);
        return command;
    }

    private void Run(ParseResult p)
    {
        var result = new Comparison
        {
            Shape = _model.Shape(p),
            DTypes = _model.DTypes(p),
            Variants = _model.Variants(p),
            Rounds = p.GetValue(_rounds),
            Steps = p.GetValue(_steps),
            Optimizer = p.GetValue(_optimizer) != "none",
            Threads = p.GetValue(_model.Threads),
            Compute = _model.Compute(p),
        }.RunSteps();
        Report.Table([" variant", " dtype", "tokens/s", "mfu", "peak over weights, gradients, state: tensors MB", "resident MB"],
            ((JsonArray)result["variants"]!).Select(v => new[]
            {
                $"{v!["name"]}", $"{v["dtype"]}", Report.Cell(v["tokensPerSecond"], 1), Report.Cell(v["mfu"], 3),
                Report.Cell(v["peakTensorBytes"], 0, 1 << 20), Report.Cell(v["peakBytes"], 0, 1 << 20),
            }));
        Comparison.PrintRest(result);
        Report.Write(p.GetValue(_json), result);
    }
}
