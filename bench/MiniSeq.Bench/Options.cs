using System.CommandLine;
using MiniSeq.Models;

namespace MiniSeq.Bench;

/// <summary>Options that several commands have.</summary>
internal static class Options
{
    public static Option<int> Number(string name, int value, string what, int least = 1)
    {
        var option = new Option<int>(name) { DefaultValueFactory = _ => value, Description = what };
        option.Validators.Add(r => { if (r.GetValueOrDefault<int>() < least) r.AddError($"{name} must be {least} or more."); });
        return option;
    }

    public static Option<int> Chunk() => Number("--chunk", 0, "rows of a mini-sequence; 0 is the automatic rule", least: 0);

    public static Option<int> Threads() => Number("--threads", 0, "threads of libtorch; 0 is its own choice", least: 0);

    public static Option<int> Rounds(int value = 3) => Number("--rounds", value, "times each form gets its turn");

    public static Option<string> DType(string value) => new("--dtype") { DefaultValueFactory = _ => value, Description = "float32 or bfloat16" };

    public static Option<FileInfo?> Json() => new("--json") { Description = "write the result to this file, too" };
}

/// <summary>The options of the commands that run a model: its shape, its batch and how it computes.</summary>
/// <param name="defaults">Where an option is not given.</param>
/// <param name="dtype">The same for the type.</param>
internal sealed class ModelOptions(Shape defaults, string dtype)
{
    private readonly Option<int> _hidden = Options.Number("--hidden", defaults.Hidden, "hidden size");
    private readonly Option<int> _intermediate = Options.Number("--intermediate", defaults.Intermediate, "intermediate size of the MLP");
    private readonly Option<int> _layers = Options.Number("--layers", defaults.Layers, "decoder layers");
    private readonly Option<int> _heads = Options.Number("--heads", defaults.Heads, "query heads");
    private readonly Option<int> _kvHeads = Options.Number("--kv-heads", defaults.KvHeads, "key/value heads");
    private readonly Option<int> _vocab = Options.Number("--vocab", defaults.Vocab, "vocabulary size");
    private readonly Option<int> _batch = Options.Number("--batch", 1, "documents of a batch");
    private readonly Option<double> _lossFraction = new("--loss-fraction") { DefaultValueFactory = _ => 1, Description = "share of the positions, at the end, that have a label" };
    private readonly Option<int> _chunk = Options.Chunk();
    private readonly Option<int> _budget = Options.Number("--budget-mb", 1024, "memory beyond weights, gradients and optimizer state, in MB of 2^20 bytes", least: 0);
    private readonly Option<RecomputePolicy> _recompute = new("--recompute") { DefaultValueFactory = _ => RecomputePolicy.Auto, Description = "what mini-sequence computes again in backward; Auto keeps what --budget-mb allows, and nothing where the least memory is sought (longest, growth)" };
    private readonly Option<string?> _offload = new("--offload") { Description = "folder where mini-sequence keeps its layer inputs in a temporary file" };
    private readonly Option<string[]> _dtype = new("--dtype") { DefaultValueFactory = _ => [dtype], AllowMultipleArgumentsPerToken = true, Description = "float32, bfloat16 or both" };

    /// <summary>The shape that commands have unless they say otherwise.</summary>
    public static Shape DefaultShape { get; } = new() { Hidden = 2048, Intermediate = 8192, Layers = 4, Heads = 32, KvHeads = 8, Vocab = 128256, Seq = 2048 };

    public Option<int> Seq { get; } = Options.Number("--seq", defaults.Seq, "tokens of a document", least: 2);

    public Option<string[]> VariantNames { get; } = new("--variants") { DefaultValueFactory = _ => ["plain", "recompute", "mini-sequence"], AllowMultipleArgumentsPerToken = true, Description = "which to run" };

    public Option<int> Lora { get; } = Options.Number("--lora", 0, "rank of a LoRA adapter on all seven projections, trained in place of the weights; 0 trains the weights", least: 0);

    public Option<int> Threads { get; } = Options.Threads();

    /// <summary>Puts the options into a command.</summary>
    /// <param name="command">Its own options come first.</param>
    /// <param name="others">Of <see cref="Seq"/>, <see cref="VariantNames"/> and <see cref="Lora"/>, those that it has.</param>
    public void AddTo(Command command, params Option[] others)
    {
        foreach (var o in new Option[] { _hidden, _intermediate, _layers, _heads, _kvHeads, _vocab, _batch, _lossFraction, _chunk, _budget, _recompute, _offload, _dtype, Threads }.Concat(others))
            command.Add(o);
    }

    public Shape Shape(ParseResult p) => new()
    {
        Hidden = p.GetValue(_hidden),
        Intermediate = p.GetValue(_intermediate),
        Layers = p.GetValue(_layers),
        Heads = p.GetValue(_heads),
        KvHeads = p.GetValue(_kvHeads),
        Vocab = p.GetValue(_vocab),
        Seq = p.GetValue(Seq),
        Batch = p.GetValue(_batch),
        LossFraction = p.GetValue(_lossFraction),
        Lora = p.GetValue(Lora),
    };

    public string[] DTypes(ParseResult p) => [.. p.GetValue(_dtype)!.SelectMany(d => d.Split(',')).Select(d => Bench.Shape.Name(Bench.Shape.ParseDType(d)))];

    public Variant[] Variants(ParseResult p) => [.. p.GetValue(VariantNames)!.SelectMany(v => v.Split(',')).Select(ParseVariant)];

    public long BudgetBytes(ParseResult p) => (long)p.GetValue(_budget) << 20;

    /// <summary>Options of mini-sequence within the budget.</summary>
    public ComputeOptions Compute(ParseResult p)
    {
        string? folder = p.GetValue(_offload);
        if (folder is not null) OffloadFile.CheckFolder(folder);
        return new ComputeOptions(p.GetValue(_chunk), p.GetValue(_recompute), BudgetBytes(p), folder);
    }

    /// <summary>The same where Auto keeps nothing, and mini-sequences have one size at all lengths.</summary>
    /// <param name="p">The command line.</param>
    /// <param name="budgetBytes">0 asks for the smallest.</param>
    public ComputeOptions LeastCompute(ParseResult p, long? budgetBytes)
    {
        var asked = Compute(p);
        return asked with { Recompute = asked.Recompute == RecomputePolicy.Auto ? RecomputePolicy.Full : asked.Recompute, MemoryBudgetBytes = budgetBytes };
    }

    private static Variant ParseVariant(string name) => Enum.GetValues<Variant>().Cast<Variant?>().FirstOrDefault(v => Bench.Shape.Name(v!.Value) == name)
        ?? throw new ArgumentException($"--variants {name} is not known: write plain, recompute or mini-sequence.");
}
