using System.Globalization;
using System.Text.Json;
using System.Text.Json.Nodes;
using MiniSeq.Models;

namespace MiniSeq.Bench;

/// <summary>Runs the variants side by side, interleaved, each in a process of its own, and reports medians and ratios.</summary>
internal sealed class Comparison
{
    public required Shape Shape { get; init; }
    public required string[] DTypes { get; init; }
    public required Variant[] Variants { get; init; }
    public int Rounds { get; init; } = 3;
    public int Steps { get; init; } = 2;
    public bool Optimizer { get; init; } = true;
    public int Threads { get; init; }
    public ComputeOptions Compute { get; init; } = new();

    /// <summary>Tokens a second and peak memory of a training step.</summary>
    public JsonObject RunSteps()
    {
        var outcomes = Pairs().ToDictionary(p => p, _ => new List<Outcome>());
        for (int round = 0; round < Rounds; round++)
            foreach (var (variant, dtype) in Pairs())
            {
                var outcome = Worker.Start(MakeOrder("step", variant, dtype, 0));
                outcomes[(variant, dtype)].Add(outcome);
                Console.Error.WriteLine($"round {round + 1}/{Rounds}: {Shape.Name(variant)} {dtype} {string.Join(' ', outcome.Seconds.Select(s => s.ToString("F2", CultureInfo.InvariantCulture)))} s, loss {outcome.Loss:F4}");
            }
        return Json(outcomes.Select(o => Result(o.Key, [
            ("tokensPerSecond", Math.Round(Shape.Seq * Shape.Batch / Median([.. o.Value.SelectMany(v => v.Seconds)]), 2)),
            ("peakBytes", o.Value.Max(v => v.PeakResidentBytes)),
            ("peakTensorBytes", o.Value.Max(v => v.PeakTensorBytes)),
            ("baseBytes", o.Value[0].BaseBytes),
            ("longest", null),
            ("loss", o.Value[0].Loss)])), ["tokensPerSecond", "peakBytes", "peakTensorBytes"], outcomes.First().Value[0].Threads);
    }

    /// <summary>The longest sequence whose step stays within a budget of memory that grows with the sequence.</summary>
    public JsonObject RunLongest(long budgetBytes)
    {
        int threads = 0;
        var results = new List<JsonObject>();
        foreach (var pair in Pairs())
        {
            var outcome = Worker.Start(MakeOrder("longest", pair.Variant, pair.DType, budgetBytes));
            threads = outcome.Threads;
            results.Add(Result(pair, [("tokensPerSecond", null), ("peakBytes", outcome.PeakTensorBytes), ("longest", outcome.Longest), ("peakTensorBytes", outcome.PeakTensorBytes), ("baseBytes", outcome.BaseBytes)]));
        }
        var json = Json(results, ["longest"], threads);
        json["budgetBytes"] = budgetBytes;
        return json;
    }

    private IEnumerable<(Variant Variant, string DType)> Pairs() => DTypes.SelectMany(d => Variants.Select(v => (v, d)));

    private Order MakeOrder(string kind, Variant variant, string dtype, long budget) => new(kind, Shape, variant, dtype, Steps, Optimizer, budget, Compute, Threads);

    private JsonObject Result((Variant Variant, string DType) pair, (string Name, JsonNode? Value)[] figures)
    {
        var json = new JsonObject { ["name"] = Shape.Name(pair.Variant), ["dtype"] = pair.DType, ["seq"] = Shape.Seq };
        foreach (var (name, value) in figures) json[name] = value;
        return json;
    }

    private JsonObject Json(IEnumerable<JsonObject> variants, string[] compared, int threads)
    {
        var gemm = new JsonObject();
        foreach (var dtype in new[] { "float32", "bfloat16" })
            gemm[dtype] = Math.Round(Worker.Start(MakeOrder("gemm", Variant.Plain, dtype, 0)).Gflops, 1);
        var list = new JsonArray([.. variants]);
        return new JsonObject
        {
            ["shape"] = JsonSerializer.SerializeToNode(Shape, new JsonSerializerOptions(JsonSerializerDefaults.Web)),
            ["device"] = Device(),
            ["threads"] = threads,
            ["gemmGflops"] = gemm,
            ["variants"] = list,
            ["ratios"] = Ratios(list, compared),
        };
    }

    // mini-sequence over each of the others of the same type; above 1 is more tokens a second, more memory, or a longer sequence.
    private static JsonObject Ratios(JsonArray variants, string[] compared)
    {
        var ratios = new JsonObject();
        foreach (var ours in variants.Where(v => (string)v!["name"]! == "mini-sequence"))
            foreach (var other in variants.Where(v => (string)v!["name"]! != "mini-sequence" && (string)v["dtype"]! == (string)ours!["dtype"]!))
                foreach (var figure in compared)
                    ratios[$"{figure}: mini-sequence / {other!["name"]} ({ours!["dtype"]})"] = Math.Round(Number(ours[figure]!) / Math.Max(1e-9, Number(other[figure]!)), 3);
        return ratios;
    }

    /// <summary>A JSON number of whatever .NET type.</summary>
    public static double Number(JsonNode node) => node.Deserialize<double>();

    internal static double Median(double[] values)
    {
        Array.Sort(values);
        return (values[(values.Length - 1) / 2] + values[values.Length / 2]) / 2;
    }

    internal static string Device()
    {
        const string Info = "/proc/cpuinfo";
        string? name = File.Exists(Info) ? File.ReadLines(Info).FirstOrDefault(l => l.StartsWith("model name", StringComparison.Ordinal)) : null;
        return name?[(name.IndexOf(':') + 1)..].Trim() ?? System.Runtime.InteropServices.RuntimeInformation.OSDescription;
    }
}
