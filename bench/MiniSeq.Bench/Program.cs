using System.CommandLine;
using System.Text.Json;
using System.Text.Json.Nodes;
using MiniSeq.Bench;
using MiniSeq.Models;

// Another process of this program (Worker.Start): no command line to parse.
if (args is ["worker", var order]) return Worker.Run(order);

Option<int> Number(string name, int value, string what) => new(name) { DefaultValueFactory = _ => value, Description = what };
var hidden = Number("--hidden", 2048, "hidden size");
var intermediate = Number("--intermediate", 8192, "intermediate size of the MLP");
var layers = Number("--layers", 4, "decoder layers");
var heads = Number("--heads", 32, "query heads");
var kvHeads = Number("--kv-heads", 8, "key/value heads");
var vocab = Number("--vocab", 128256, "vocabulary size");
var seq = Number("--seq", 2048, "tokens of a document");
var batch = Number("--batch", 1, "documents of a batch");
var chunk = Number("--chunk", 0, "rows of a mini-sequence; 0 is the automatic rule");
var threads = Number("--threads", 0, "threads of libtorch; 0 is its own choice");
var rounds = Number("--rounds", 3, "times each variant gets its turn");
var steps = Number("--steps", 2, "steps timed in a turn, after one that is not");
var budget = Number("--budget-mb", 1024, "memory beyond weights, gradients and optimizer state, in MB of 2^20 bytes");
var lossFraction = new Option<double>("--loss-fraction") { DefaultValueFactory = _ => 1, Description = "share of the positions, at the end, that have a label" };
var dtype = new Option<string[]>("--dtype") { DefaultValueFactory = _ => ["float32"], AllowMultipleArgumentsPerToken = true, Description = "float32, bfloat16 or both" };
var variants = new Option<string[]>("--variants") { DefaultValueFactory = _ => ["plain", "recompute", "mini-sequence"], AllowMultipleArgumentsPerToken = true, Description = "which to run" };
var optimizer = new Option<string>("--optimizer") { DefaultValueFactory = _ => "adamw", Description = "adamw, or none: forward and backward only" };
var recompute = new Option<RecomputePolicy>("--recompute") { DefaultValueFactory = _ => RecomputePolicy.Auto, Description = "what mini-sequence computes again in backward; Auto keeps what --budget-mb allows, and nothing where the longest sequence is sought" };
var json = new Option<FileInfo?>("--json") { Description = "write the result to this file, too" };

Option[] shared = [hidden, intermediate, layers, heads, kvHeads, vocab, seq, batch, chunk, threads, lossFraction, dtype, variants, budget, recompute, json];
var step = new Command("step", "Tokens a second and peak memory of a training step: plain, recompute, mini-sequence.");
foreach (var o in shared.Concat([rounds, steps, optimizer])) step.Add(o);
step.SetAction(p => Finish(p, Make(p).RunSteps()));
var longest = new Command("longest", "The longest sequence of each variant within a budget of memory that grows with the sequence.");
foreach (var o in shared) longest.Add(o);
longest.SetAction(p => Finish(p, Make(p).RunLongest((long)p.GetValue(budget) << 20)));
var root = new RootCommand("Measures MiniSeqMLNet against the plain TorchSharp forms, and checks it against reference numbers.") { step, longest, ReferenceCommand.Create(), PlanCommand.Create() };
try
{
    var parsed = root.Parse(args);
    int code = parsed.Invoke(new InvocationConfiguration { EnableDefaultExceptionHandler = false });
    return parsed.Errors.Count > 0 ? 2 : code;
}
catch (Exception e) when (e is ArgumentException or InvalidDataException or InvalidOperationException or IOException or UnauthorizedAccessException)
{
    Console.Error.WriteLine(e.Message);
    return 2; // 1 is a difference that was measured
}

Comparison Make(ParseResult p) => new()
{
    Shape = new Shape
    {
        Hidden = p.GetValue(hidden),
        Intermediate = p.GetValue(intermediate),
        Layers = p.GetValue(layers),
        Heads = p.GetValue(heads),
        KvHeads = p.GetValue(kvHeads),
        Vocab = p.GetValue(vocab),
        Seq = p.GetValue(seq),
        Batch = p.GetValue(batch),
        LossFraction = p.GetValue(lossFraction),
    },
    DTypes = [.. p.GetValue(dtype)!.SelectMany(d => d.Split(',')).Select(d => Shape.ParseDType(d).ToString().ToLowerInvariant())],
    Variants = [.. p.GetValue(variants)!.SelectMany(v => v.Split(',')).Select(ParseVariant)],
    Rounds = Math.Max(1, IsStep(p) ? p.GetValue(rounds) : 1),
    Steps = Math.Max(1, IsStep(p) ? p.GetValue(steps) : 1),
    Optimizer = IsStep(p) && p.GetValue(optimizer) != "none",
    Threads = p.GetValue(threads),
    Compute = new ComputeOptions(p.GetValue(chunk), Policy(p), (long)p.GetValue(budget) << 20),
};

bool IsStep(ParseResult p) => p.CommandResult.Command == step;

RecomputePolicy Policy(ParseResult p) => !IsStep(p) && p.GetValue(recompute) == RecomputePolicy.Auto ? RecomputePolicy.Full : p.GetValue(recompute);

static Variant ParseVariant(string name) => Enum.GetValues<Variant>().Cast<Variant?>().FirstOrDefault(v => Shape.Name(v!.Value) == name)
    ?? throw new ArgumentException($"--variants {name} is not known: write plain, recompute or mini-sequence.");

int Finish(ParseResult p, JsonObject result)
{
    string text = result.ToJsonString(new JsonSerializerOptions { WriteIndented = true });
    Table(result);
    if (p.GetValue(json) is { } file) File.WriteAllText(file.FullName, text + Environment.NewLine);
    else Console.WriteLine(text);
    return 0;
}

static void Table(JsonObject result)
{
    static string Cell(JsonNode? n, double unit = 1, string format = "N0") => n is null ? "-" : (Comparison.Number(n) / unit).ToString(format, System.Globalization.CultureInfo.InvariantCulture);
    Console.WriteLine("| variant | dtype | tokens/s | peak over weights, gradients, state: resident MB | tensors MB | longest, tokens |");
    Console.WriteLine("| --- | --- | ---: | ---: | ---: | ---: |");
    foreach (var v in (JsonArray)result["variants"]!)
        Console.WriteLine($"| {v!["name"]} | {v["dtype"]} | {Cell(v["tokensPerSecond"], 1, "N1")} | {Cell(v["peakBytes"], 1 << 20)} | {Cell(v["peakTensorBytes"], 1 << 20)} | {Cell(v["longest"])} |");
    foreach (var (name, ratio) in (JsonObject)result["ratios"]!) Console.WriteLine($"{name}: {ratio}");
}
