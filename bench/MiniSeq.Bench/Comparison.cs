using System.Globalization;
using System.Text.Json.Nodes;
using MiniSeq.Models;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>Runs the variants side by side, interleaved, each in a process of its own, and reports medians and ratios.</summary>
internal sealed class Comparison
{
    private static readonly string[] s_types = [Shape.Name(ScalarType.Float32), Shape.Name(ScalarType.BFloat16)];

    public required Shape Shape { get; init; }
    public required string[] DTypes { get; init; }
    public required Variant[] Variants { get; init; }
    public int Rounds { get; init; } = 1;
    public int Steps { get; init; } = 1;
    public bool Optimizer { get; init; }
    public int Threads { get; init; }
    public ComputeOptions Compute { get; init; } = new();

    /// <summary>Tokens a second, share of the machine's rate and peak memory of a training step.</summary>
    public JsonObject RunSteps()
    {
        var outcomes = Pairs().ToDictionary(p => p, _ => new List<Outcome>());
        for (int round = 0; round < Rounds; round++)
            foreach (var (variant, dtype) in Pairs())
            {
                var outcome = Worker.Start(MakeOrder("step", variant, dtype));
                outcomes[(variant, dtype)].Add(outcome);
                Console.Error.WriteLine($"round {round + 1}/{Rounds}: {Shape.Name(variant)} {dtype} {string.Join(' ', outcome.Seconds.Select(s => s.ToString("F2", CultureInfo.InvariantCulture)))} s, loss {outcome.Loss:F4}");
            }
        var products = Products();
        double flops = ModelFlops.Of(Shape);
        var results = outcomes.Select(o =>
        {
            double seconds = Report.Median(o.Value.SelectMany(v => v.Seconds));
            return Result(o.Key, [
                ("tokensPerSecond", Math.Round(Shape.Seq * Shape.Batch / seconds, 2)),
                ("mfu", Math.Round(flops / seconds / 1e9 / products[o.Key.DType].Gflops, 4)),
                ("peakBytes", o.Value.Max(v => v.PeakResidentBytes)),
                ("peakTensorBytes", o.Value.Max(v => v.PeakTensorBytes)),
                ("baseBytes", o.Value[0].BaseBytes),
                ("loss", o.Value[0].Loss)]);
        });
        var json = Json(results, ["tokensPerSecond", "peakBytes", "peakTensorBytes"], outcomes.First().Value[0].Threads, products);
        json["stepGflop"] = Math.Round(flops / 1e9, 1);
        return json;
    }

    /// <summary>The longest sequence whose step stays within a budget of memory that grows with the sequence.</summary>
    /// <param name="budgetBytes">The budget.</param>
    /// <param name="timed">Whether a forward and backward at it is timed.</param>
    public JsonObject RunLongest(long budgetBytes, bool timed)
    {
        int threads = 0;
        var results = new List<JsonObject>();
        foreach (var pair in Pairs())
        {
            var outcome = Worker.Start(MakeOrder("longest", pair.Variant, pair.DType) with { BudgetBytes = budgetBytes, Timed = timed });
            threads = outcome.Threads;
            long inputs = (long)Shape.Layers * Shape.Hidden * Shape.ParseDType(pair.DType).ElementSize();
            results.Add(Result(pair, [
                ("longest", outcome.Longest),
                ("peakTensorBytes", outcome.PeakTensorBytes),
                ("baseBytes", outcome.BaseBytes),
                ("bytesPerToken", Math.Round(outcome.BytesPerToken, 1)),
                ("inputBytesPerToken", inputs),
                ("slopeRatio", Math.Round(outcome.BytesPerToken / inputs, 3)),
                ("tokensPerSecond", timed && outcome.Seconds.Length > 0 ? Math.Round(outcome.Longest * Shape.Batch / outcome.Seconds[0], 2) : null)]));
        }
        var json = Json(results, ["longest", "bytesPerToken"], threads, Products());
        json["budgetBytes"] = budgetBytes;
        return json;
    }

    /// <summary>What is printed under the table: the machine's rates and the ratios.</summary>
    public static void PrintRest(JsonObject result)
    {
        var products = ((JsonObject)result["gemmGflops"]!).Select(g => $"{g.Key} {Report.Cell(g.Value)} GFLOP/s ({result["gemmProducts"]![g.Key]})");
        Console.WriteLine($"fastest matrix product: {string.Join(", ", products)}");
        foreach (var (name, ratio) in (JsonObject)result["ratios"]!) Console.WriteLine($"{name}: {ratio}");
    }

    private IEnumerable<(Variant Variant, string DType)> Pairs() => DTypes.SelectMany(d => Variants.Select(v => (v, d)));

    private Order MakeOrder(string kind, Variant variant, string dtype) => new(kind, Shape, variant, dtype, Steps, Optimizer, 0, Compute, Threads);

    private JsonObject Result((Variant Variant, string DType) pair, (string Name, JsonNode? Value)[] figures)
    {
        var json = new JsonObject { ["name"] = Shape.Name(pair.Variant), ["dtype"] = pair.DType, ["seq"] = Shape.Seq };
        foreach (var (name, value) in figures) json[name] = value;
        return json;
    }

    private Dictionary<string, Outcome> Products() => s_types.ToDictionary(d => d, d => Worker.Start(MakeOrder("gemm", Variant.Plain, d)));

    private JsonObject Json(IEnumerable<JsonObject> variants, string[] compared, int threads, Dictionary<string, Outcome> products)
    {
        var list = new JsonArray([.. variants]);
        return new JsonObject
        {
            ["shape"] = Report.Json(Shape),
            ["device"] = Report.Device(),
            ["threads"] = threads,
            ["gemmGflops"] = new JsonObject(products.Select(p => KeyValuePair.Create(p.Key, (JsonNode?)Math.Round(p.Value.Gflops, 1)))),
            ["gemmProducts"] = new JsonObject(products.Select(p => KeyValuePair.Create(p.Key, (JsonNode?)p.Value.Product))),
            ["variants"] = list,
            ["ratios"] = Ratios(list, compared),
        };
    }

    // mini-sequence over each of the others, of the same type and in bfloat16 over theirs in float32; above 1 is more tokens a second, more memory,
    // or a longer sequence.
    private static JsonObject Ratios(JsonArray variants, string[] compared)
    {
        var ratios = new JsonObject();
        foreach (var ours in variants.Where(v => (string)v!["name"]! == "mini-sequence"))
            foreach (var other in variants.Where(v => (string)v!["name"]! != "mini-sequence"))
            {
                var (type, otherType) = ((string)ours!["dtype"]!, (string)other!["dtype"]!);
                if (type != otherType && otherType != s_types[0]) continue;
                string pair = type == otherType ? $"mini-sequence / {other["name"]} ({type})" : $"mini-sequence ({type}) / {other["name"]} ({otherType})";
                foreach (var figure in compared)
                    ratios[$"{figure}: {pair}"] = Math.Round(Report.Number(ours[figure]!) / Math.Max(1e-9, Report.Number(other[figure]!)), 3);
            }
        return ratios;
    }
}
