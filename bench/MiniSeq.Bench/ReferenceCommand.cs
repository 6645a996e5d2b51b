using System.CommandLine;
using System.Globalization;
using System.Text.Json;
using System.Text.Json.Nodes;
using System.Text.Json.Serialization;
using MiniSeq.Models;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>The command <c>reference</c>: checks folders, prints a line for each, and ends with what became of them.</summary>
internal sealed class ReferenceCommand
{
    private const int Beyond = 1, Unreadable = 2;
    private static readonly JsonSerializerOptions s_json = new(JsonSerializerDefaults.Web)
    {
        WriteIndented = true,
        NumberHandling = JsonNumberHandling.AllowNamedFloatingPointLiterals,
        Converters = { new JsonStringEnumConverter() },
    };

    private readonly Argument<string[]> _folders = new("folders") { Arity = ArgumentArity.OneOrMore, Description = "config.json, model*.safetensors, expected.safetensors and expected.json; or a folder of such folders; or one with reference.json (mean loss and greedy text only)" };
    private readonly Option<int[]> _chunk = new("--chunk") { DefaultValueFactory = _ => [1, 7, 64, 0], AllowMultipleArgumentsPerToken = true, Description = "rows of a mini-sequence; 0 is the automatic rule" };
    private readonly Option<RecomputePolicy[]> _recompute = new("--recompute") { DefaultValueFactory = _ => [RecomputePolicy.Full, RecomputePolicy.KeepAttention, RecomputePolicy.None], AllowMultipleArgumentsPerToken = true, Description = "what is computed again in backward" };
    private readonly Option<string?> _dtype = new("--dtype") { Description = "type of the weights in memory and of the computation, whatever the file's; float32 where not given, or bfloat16 where expected.json's computed_in begins so" };
    private readonly Option<double?> _tolerance = new("--tolerance") { Description = "largest difference that passes; 1e-4, or 0.25 in bfloat16, where not given" };
    private readonly Option<FileInfo?> _output = new("--json") { Description = "write the result to this file, too" };

    private ReferenceCommand()
    {
        _dtype.AcceptOnlyFromAmong("float32", "bfloat16", "float64");
        _tolerance.Validators.Add(r => { if (r.GetValueOrDefault<double?>() is not (null or > 0 and < double.PositiveInfinity)) r.AddError("--tolerance must be a positive number."); });
        _chunk.Validators.Add(r => { if (r.GetValueOrDefault<int[]>()!.Any(c => c < 0)) r.AddError("--chunk must be positive, or 0 for the automatic rule."); });
    }

    /// <summary>The command, ready to be part of a program.</summary>
    public static Command Create()
    {
        var it = new ReferenceCommand();
        var command = new Command("reference", """
            Checks checkpoints against the logits, loss, gradients and greedy text that another implementation computed from them.

            A tensor's difference is max |got - want| / max |want| (max), and ||got - want|| / ||want|| (L2). The file's numbers are themselves rounded:
            its float32_noise_vs_float64 gives their distance from the truth, for gradients as L2, so L2 is what can be held against it, at a few
            times the noise; max, which a single wrong entry moves, has no more noise in float32 and has to stay within the same tolerance. In
            bfloat16 only L2 is judged, for its max is the worst luck of all roundings; and greedy ids may part where the file's own lead of the
            best token is below twice the largest error of the logits, or unknown. In float32 and float64 they have to be equal.

            A folder below, with a LoRA adapter in PEFT's format and expected_adapter.safetensors and .json, has a line of its own: the model with
            the adapter, the gradients of the adapter's tensors, and logits and greedy text again with the adapter merged into the weights.

            Logits and greedy text are computed once, loss and gradients for every pair of --chunk and --recompute; the table has the worst of them.

            Ends with 0 if all that was checked is within the tolerance, 1 if something is not, 2 if a folder could not be read or none could be
            checked. An architecture that the library refuses is said so and not counted.
            """) { it._folders, it._chunk, it._recompute, it._dtype, it._tolerance, it._output };
        command.SetAction(it.Run);
        return command;
    }

    private int Run(ParseResult p)
    {
        ScalarType? dtype = p.GetValue(_dtype) is { } said ? Enum.Parse<ScalarType>(said, ignoreCase: true) : null;
        ComputeOptions[] options = [.. p.GetValue(_chunk)!.SelectMany(chunk => p.GetValue(_recompute)!.Select(policy => new ComputeOptions(chunk, policy)))];
        // Before the work: a name that cannot be written is known at once.
        using var json = p.GetValue(_output) is { } file ? new StreamWriter(file.FullName) : null;
        List<Line> lines = [.. p.GetValue(_folders)!.SelectMany(Models).Select(folder => Check(folder, dtype, options, p.GetValue(_tolerance)))];
        Table(lines);
        if (json is not null) json.Write(Json(lines) + Environment.NewLine);
        return ExitCode(lines);
    }

    /// <summary>What was measured, and what is wrong with it.</summary>
    private sealed record Measured(ReferenceResult Result, ScalarType DType, ReferenceBounds Bounds)
    {
        public IReadOnlyList<string> Faults { get; } = Bounds.Faults(Result);
    }

    /// <summary>One folder: what was measured, or why nothing was.</summary>
    private sealed record Line(string Model, Measured? Measured, string? Refused = null, string? Unreadable = null);

    private static Line Check(string path, ScalarType? dtype, ComputeOptions[] options, double? tolerance)
    {
        string name = ReferenceFolder.NameOf(path);
        try
        {
            using var folder = ReferenceFolder.Open(path, dtype);
            var type = folder.Model.DType;
            return new Line(name, new Measured(folder.Check(options), type, ReferenceBounds.Of(type, tolerance)));
        }
        catch (NotSupportedException e)
        {
            return new Line(name, null, Refused: e.Message);
        }
        catch (Exception e) // of whatever kind: the other folders are still to be checked
        {
            Console.Error.WriteLine(e.Message);
            return new Line(name, null, Unreadable: e.Message);
        }
    }

    // The folder itself, or those in it, each with the adapters below it. A folder without any is its own: the message is then about it.
    private static IEnumerable<string> Models(string folder)
    {
        if (ReferenceFolder.IsModel(folder)) return WithAdapters(folder);
        if (!Directory.Exists(folder)) return [folder];
        string[] inside = [.. Directory.GetDirectories(folder).Where(ReferenceFolder.IsModel).Order(StringComparer.Ordinal)];
        return inside.Length > 0 ? inside.SelectMany(WithAdapters) : [folder];
    }

    private static IEnumerable<string> WithAdapters(string folder) =>
        Directory.GetDirectories(folder).Where(ReferenceFolder.IsAdapter).Order(StringComparer.Ordinal).Prepend(folder);

    private static int ExitCode(List<Line> lines) =>
        lines.Any(l => l.Unreadable is not null) || lines.All(l => l.Refused is not null) ? Unreadable
        : lines.Any(l => l.Measured is { Faults.Count: > 0 }) ? Beyond : 0;

    private static void Table(List<Line> lines)
    {
        Console.WriteLine("| model | architecture | layers | runs | logits: max | L2 | loss | worst gradient: max | L2 | greedy equal | verdict |");
        Console.WriteLine("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- | --- |");
        foreach (var line in lines) Console.WriteLine($"| {line.Model} | {string.Join(" | ", line.Measured is { } measured ? Cells(measured.Result, measured) : NoCells(line))} |");
    }

    private static string[] Cells(ReferenceResult r, Measured measured) =>
    [
        r.Architecture, $"{r.Layers}", $"{r.Runs.Count}", Number(r.Logits.Max), Number(r.Logits.L2), Number(r.Loss),
        Named(r.WorstGradient(d => d.Max)), Named(r.WorstGradient(d => d.L2)),
        Equal(r.Inference.Greedy) + (r.Merged is { } merged ? $"; merged: {Equal(merged.Greedy)}" : ""), Verdict(measured),
    ];

    private static string Equal(GreedyResult greedy) => greedy.Equal == greedy.Wanted ? "yes" : $"no, from token {greedy.Equal + 1} of {greedy.Wanted} on";

    private static string Verdict(Measured m)
    {
        string bound = $"{Number(m.Bounds.Tolerance)} in {Name(m.DType)}";
        return m.Faults.Count == 0 ? $"within {bound}" : $"beyond {bound}: {m.Faults[0]}{(m.Faults.Count > 1 ? $" and {m.Faults.Count - 1} more" : "")}";
    }

    private static string Name(ScalarType dtype) => dtype.ToString().ToLowerInvariant();

    private static string[] NoCells(Line line) => [.. Enumerable.Repeat("-", 9), (line.Refused is null ? "unreadable: " + line.Unreadable : "refused: " + line.Refused).Replace("|", "\\|", StringComparison.Ordinal)];

    private static string Named(NamedDifference? d) => d is null ? "-" : $"{Number(d.Off)} {d.Name}";

    private static string Number(double value) => value.ToString("0.0E+0", CultureInfo.InvariantCulture);

    private static string Json(List<Line> lines) => new JsonObject { ["models"] = new JsonArray([.. lines.Select(Json)]) }.ToJsonString(s_json);

    private static JsonNode Json(Line line)
    {
        if (line.Measured is not { } m)
            return new JsonObject { ["model"] = line.Model, ["status"] = line.Refused is null ? "unreadable" : "refused", ["message"] = line.Refused ?? line.Unreadable };
        return new JsonObject
        {
            ["model"] = line.Model,
            ["status"] = m.Faults.Count > 0 ? "beyond" : "within",
            ["dtype"] = Name(m.DType),
            ["tolerance"] = m.Bounds.Tolerance,
            ["judged"] = m.Bounds.Entrywise ? "max |got - want| / max |want| and L2" : "L2: ||got - want|| / ||want||",
            ["faults"] = JsonSerializer.SerializeToNode(m.Faults, s_json),
            ["result"] = Json(m.Result),
        };
    }

    private static JsonNode? Json(ReferenceResult r) => JsonSerializer.SerializeToNode(new
    {
        r.Architecture,
        r.Layers,
        r.Inference,
        r.Merged,
        r.Loss,
        r.Gradients,
        Runs = r.Runs.Select(run => new { run.Options.ChunkSize, run.Options.Recompute, run.Loss, Gradients = run.Worst }),
        NoiseOfTheFile = r.Noise,
    }, s_json);
}
