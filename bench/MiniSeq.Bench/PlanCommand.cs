using System.CommandLine;
using System.Globalization;
using System.Text.Json;
using System.Text.Json.Nodes;
using System.Text.Json.Serialization;

namespace MiniSeq.Bench;

/// <summary>The command <c>plan</c>: the memory plan against measured peaks, or what it says of models that do not fit here.</summary>
internal sealed class PlanCommand
{
    private const int Off = 1, Uncountable = 2;
    private static readonly JsonSerializerOptions s_json = new(JsonSerializerDefaults.Web) { WriteIndented = true, Converters = { new JsonStringEnumConverter() } };

    private readonly Option<bool> _models = new("--models") { Description = "the longest sequence of known models on 24, 48 and 80 GB, predicted and not measured" };
    private readonly Option<FileInfo?> _output = new("--json") { Description = "write the result to this file, too" };

    /// <summary>The command, ready to be part of a program.</summary>
    public static Command Create()
    {
        var it = new PlanCommand();
        var command = new Command("plan", $"""
            Measures the peak memory of training steps over several configurations against the one that MemoryPlan predicts.

            Activations are the peak beyond weights, gradients and optimizer state, all of which exist before. Whole is a process's first step: model,
            optimizer state (AdamW, float32), gradients made in it, activations. Tensors are counted exactly; MB of 10^6 bytes.

            Ends with 0 if each of mini-sequence's predictions is within {100 * PlanMeasurement.Tolerance:0}% of what was measured, 1 if one is not, 2 if tensors cannot be counted here.
            """) { it._models, it._output };
        command.SetAction(it.Run);
        return command;
    }

    private int Run(ParseResult p)
    {
        // Before the work: a name that cannot be written is known at once.
        using var json = p.GetValue(_output) is { } file ? new StreamWriter(file.FullName) : null;
        var (result, code) = p.GetValue(_models) ? Models() : Measured();
        json?.Write(result.ToJsonString(s_json) + Environment.NewLine);
        return code;
    }

    private static (JsonNode Result, int Code) Measured()
    {
        if (!MiniSeq.Layers.TensorMemory.StartCounting())
        {
            Console.Error.WriteLine("Tensor memory cannot be counted on this system: nothing to hold the plan against.");
            return (new JsonObject(), Uncountable);
        }
        Console.WriteLine("| form | model | S | labels | layers | chunk | keeps | dtype | trained | activations: measured MB | predicted | ratio | whole: measured MB | predicted | ratio |");
        Console.WriteLine("| --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
        var lines = new List<PlanMeasurement>();
        foreach (var c in PlanCase.All)
        {
            var line = PlanMeasurement.Of(c);
            lines.Add(line);
            Console.WriteLine($"| {Shape.Name(c.Variant)} | {c.Model} | {c.Rows} | {100 * c.Labelled:0}% | {c.Config.NumHiddenLayers} | {Chunk(c)} | {Keeps(c)} | {c.DType.ToString().ToLowerInvariant()} | {(c.Rank > 0 ? $"LoRA {c.Rank}" : "all")} "
                + $"| {Cells(line.Activations)} | {Cells(line.Whole)} |");
        }
        var worst = lines.Where(l => l.Case.Variant == Variant.MiniSequence).MaxBy(l => l.Error)!;
        Console.WriteLine(FormattableString.Invariant($"The worst of mini-sequence is off by {100 * worst.Error:F1}%: {worst.Case.Model}, {worst.Case.Rows} tokens. The worst of the plain forms: {lines.Where(l => l.Case.Variant != Variant.MiniSequence).Max(l => 100 * l.Error):F1}%."));
        return (new JsonObject { ["tolerance"] = PlanMeasurement.Tolerance, ["lines"] = JsonSerializer.SerializeToNode(lines.Select(l => new { Case = Named(l.Case), l.Activations, l.Whole }), s_json) }, worst.Error > PlanMeasurement.Tolerance ? Off : 0);
    }

    private static object Named(PlanCase c) => new
    {
        Form = Shape.Name(c.Variant),
        c.Model,
        Seq = c.Rows,
        c.Labelled,
        Layers = c.Config.NumHiddenLayers,
        c.Config.HiddenSize,
        c.Config.IntermediateSize,
        c.Config.VocabSize,
        c.Compute.ChunkSize,
        c.Compute.Recompute,
        c.Compute.MemoryBudgetBytes,
        DType = c.DType.ToString().ToLowerInvariant(),
        LoraRank = c.Rank,
    };

    private static string Chunk(PlanCase c) => c.Variant != Variant.MiniSequence ? "-" : c.Compute.ChunkSize == 0 ? "auto" : $"{c.Compute.ChunkSize}";

    private static string Keeps(PlanCase c) => c.Variant != Variant.MiniSequence ? "-" : c.Compute.MemoryBudgetBytes is { } budget ? $"Auto, {budget >> 20} MiB" : $"{c.Compute.Recompute}";

    private static string Cells(PlanFigures f) => string.Create(CultureInfo.InvariantCulture, $"{f.MeasuredBytes / 1e6:F1} | {f.PredictedBytes / 1e6:F1} | {f.Ratio:F3}");

    private static (JsonNode Result, int Code) Models()
    {
        Console.WriteLine($"Longest sequence, in tokens, of one step over one document with a label on every token; predicted. GB of 2^30 bytes. Mini-sequence keeps each layer's input only, chunks are automatic.");
        Console.WriteLine(string.Join(Environment.NewLine, PlannedModels.Notes));
        string[] forms = [.. Enum.GetValues<Variant>().Select(Shape.Name)];
        List<PlannedModel> lines = [.. PlannedModels.All()];
        Report.Table([" model", " setting", "weights + state GB", .. PlannedModels.Gigabytes.SelectMany(gb => forms.Select((f, i) => i == 0 ? $"{gb} GB: {f}" : f))],
            lines.Select(l => (string[])[l.Model, l.Setting, Report.Cell(l.ResidentBytes / (double)(1L << 30), 1), .. l.Longest.Select(n => n == 0 ? "-" : Report.Cell(n))]));
        return (new JsonObject { ["gigabytes"] = JsonSerializer.SerializeToNode(PlannedModels.Gigabytes, s_json), ["forms"] = JsonSerializer.SerializeToNode(forms, s_json), ["lines"] = JsonSerializer.SerializeToNode(lines, s_json) }, 0);
    }
}
