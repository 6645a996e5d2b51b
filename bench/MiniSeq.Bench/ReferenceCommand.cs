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

    private readonly Argument<string[]> _folders = new("folders") { Arity = ArgumentArity.OneOrMore, Description = "config.json, model*.safetensors, expected.safetensors and expected.json; or a folder of such folders; or one with reference.json (mean loss and greedy text only). A PEFT adapter below one, with expected_adapter.*, is checked, too" };
    private readonly Option<int[]> _chunk = new("--chunk") { DefaultValueFactory = _ => [1, 7, 64, 0], AllowMultipleArgumentsPerToken = true, Description = "rows of a mini-sequence; 0 is the automatic rule" };
    private readonly Option<RecomputePolicy[]> _recompute = new("--recompute") { DefaultValueFactory = _ => [RecomputePolicy.Full, RecomputePolicy.KeepAttention, RecomputePolicy.None], AllowMultipleArgumentsPerToken = true, Description = "what is computed again in backward" };
    private readonly Option<string> _dtype = new("--dtype") { DefaultValueFactory = _ => "float32", Description = "type of the weights in memory and of the computation, whatever the file's" };
    private readonly Option<double?> _tolerance = new("--tolerance") { Description = "largest difference that passes; 1e-4, or 0.25 in bfloat16, where not given" };
    private readonly Option<FileInfo?> _output = new("--json") { Description = "write the result to this file, too" };

    private ReferenceCommand() => _dtype.AcceptOnlyFromAmong("float32", "bfloat16", "float64");

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

            Logits and greedy text are computed once, loss and gradients for every pair of --chunk and --recompute; the table has the worst of them.

            Ends with 0 if all that was checked is within the tolerance, 1 if something is not, 2 if a folder could not be read or none could be
            checked. An architecture that the library refuses is said so and not counted.
            """) { it._folders, it._chunk, it._recompute, it._dtype, it._tolerance, it._output };
        command.SetAction(it.Run);
        return command;
    }

    private int Run(ParseResult p)
    {
        var dtype = Enum.Parse<ScalarType>(p.GetValue(_dtype)!, ignoreCase: true);
        var bounds = ReferenceBounds.Of(dtype, p.GetValue(_tolerance));
        ComputeOptions[] options = [.. p.GetValue(_chunk)!.SelectMany(chunk => p.GetValue(_recompute)!.Select(policy => new ComputeOptions(chunk, policy)))];
        List<Line> lines = [.. p.GetValue(_folders)!.SelectMany(Models).Select(folder => Check(folder, dtype, options, bounds))];
        Table(lines, bounds);
        if (p.GetValue(_output) is { } file) File.WriteAllText(file.FullName, Json(lines, p.GetValue(_dtype)!, bounds) + Environment.NewLine);
        return ExitCode(lines);
    }

    /// <summary>One folder: its result and what is wrong with it, or why there is none.</summary>
    private sealed record Line(string Model, ReferenceResult? Result, IReadOnlyList<string> Faults, string? Refused, string? Unreadable);

    private static Line Check(string path, ScalarType dtype, ComputeOptions[] options, ReferenceBounds bounds)
    {
        string name = ReferenceFolder.NameOf(path);
        try
        {
            using var folder = ReferenceFolder.Open(path, dtype);
            var result = folder.Check(options);
            return new Line(name, result, bounds.Faults(result), null, null);
        }
        catch (NotSupportedException e)
        {
            return new Line(name, null, [], e.Message, null);
        }
        catch (Exception e) when (e is IOException or InvalidDataException or UnauthorizedAccessException or KeyNotFoundException or ArgumentException)
        {
            Console.Error.WriteLine(e.Message);
            return new Line(name, null, [], null, e.Message);
        }
    }

    // The folder itself, or those in it, each with the adapter below it. A folder without any is its own: the message is then about it.
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
        : lines.Any(l => l.Faults.Count > 0) ? Beyond : 0;

    private static void Table(List<Line> lines, ReferenceBounds bounds)
    {
        Console.WriteLine("| model | architecture | layers | runs | logits: max | L2 | loss | worst gradient: max | L2 | greedy equal | verdict |");
        Console.WriteLine("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- | --- |");
        foreach (var line in lines) Console.WriteLine($"| {line.Model} | {string.Join(" | ", line.Result is { } result ? Cells(result, line.Faults, bounds) : NoCells(line))} |");
    }

    private static string[] Cells(ReferenceResult r, IReadOnlyList<string> faults, ReferenceBounds bounds) =>
    [
        r.Architecture, $"{r.Layers}", $"{r.Runs.Count}", Number(r.Logits.Max), Number(r.Logits.L2), Number(r.Loss),
        Named(r.WorstGradient(d => d.Max)), Named(r.WorstGradient(d => d.L2)),
        r.Greedy.Equal == r.Greedy.Wanted ? "yes" : $"no, from token {r.Greedy.Equal + 1} of {r.Greedy.Wanted} on",
        faults.Count == 0 ? $"within {Number(bounds.Tolerance)}" : $"beyond {Number(bounds.Tolerance)}: {faults[0]}{(faults.Count > 1 ? $" and {faults.Count - 1} more" : "")}",
    ];

    private static string[] NoCells(Line line) => [.. Enumerable.Repeat("-", 9), (line.Refused is null ? "unreadable: " + line.Unreadable : "refused: " + line.Refused).Replace("|", "\\|", StringComparison.Ordinal)];

    private static string Named(NamedDifference? d) => d is null ? "-" : $"{Number(d.Off)} {d.Name}";

    private static string Number(double value) => value.ToString("0.0E+0", CultureInfo.InvariantCulture);

    private static string Json(List<Line> lines, string dtype, ReferenceBounds bounds) => new JsonObject
    {
        ["dtype"] = dtype,
        ["tolerance"] = bounds.Tolerance,
        ["judged"] = bounds.Entrywise ? "max |got - want| / max |want| and L2" : "L2: ||got - want|| / ||want||",
        ["models"] = new JsonArray([.. lines.Select(Json)]),
    }.ToJsonString(s_json);

    private static JsonNode Json(Line line)
    {
        var json = new JsonObject { ["model"] = line.Model, ["status"] = line.Unreadable is not null ? "unreadable" : line.Refused is not null ? "refused" : line.Faults.Count > 0 ? "beyond" : "within" };
        if ((line.Unreadable ?? line.Refused) is { } message) json["message"] = message;
        json["faults"] = JsonSerializer.SerializeToNode(line.Faults, s_json);
        json["result"] = line.Result is { } result ? Json(result) : null;
        return json;
    }

    private static JsonNode? Json(ReferenceResult r) => JsonSerializer.SerializeToNode(new
    {
        r.Architecture,
        r.Layers,
        r.Logits,
        r.LogitsAbsolute,
        r.Loss,
        r.Gradients,
        r.Greedy,
        Runs = r.Runs.Select(run => new { run.Options.ChunkSize, run.Options.Recompute, run.Loss, Gradients = run.Worst }),
        NoiseOfTheFile = r.Noise,
    }, s_json);
}
