using Microsoft.ML;
using Microsoft.ML.Data;
using Microsoft.ML.Transforms;

namespace MiniSeq.MLNet;

/// <summary>
/// The form a model has in the zip file. ML.NET lets only its own transformers write there, so it is a chain of six of them: the text
/// and a constant are copied aside, a lookup table turns the constant into the manifest, a custom mapping with a contract turns text and
/// manifest into the generated text, which is copied to the output column, and the columns in between are dropped.
/// </summary>
internal static class SavedPipeline
{
    public const string Contract = "MiniSeq.CausalLM/1";
    public const string Text = "__miniseq.text";
    public const string Key = "__miniseq.key";
    public const string State = "__miniseq.state";
    public const string Generated = "__miniseq.generated";

    public static TransformerChain<ITransformer> Build(MLContext context, PipelineSettings settings, string state)
    {
        var t = context.Transforms;
        var row = SchemaDefinition.Create(typeof(TextRow));
        row[nameof(TextRow.Text)].ColumnName = settings.InputColumnName;
        return new EstimatorChain<ITransformer>()
            .Append((IEstimator<ITransformer>)t.CopyColumns(Text, settings.InputColumnName))
            .Append((IEstimator<ITransformer>)t.Expression(Key, "x : 0", Text))
            .Append((IEstimator<ITransformer>)t.Conversion.MapValue(State, [KeyValuePair.Create(0, state)], Key))
            .Append((IEstimator<ITransformer>)t.CustomMapping<SavedInput, SavedOutput>(new SavedMapping([]).Map, Contract))
            .Append((IEstimator<ITransformer>)t.CopyColumns(settings.OutputColumnName, Generated))
            .Append((IEstimator<ITransformer>)t.DropColumns(Text, Key, State, Generated))
            .Fit(context.Data.LoadFromEnumerable([new TextRow()], row));
    }

    /// <summary>The model somewhere in a pipeline; null if there is none.</summary>
    public static MiniSeqTransformer? Find(MLContext context, ITransformer transformer)
    {
        if (transformer is MiniSeqTransformer live) return live;
        if (transformer is not IEnumerable<ITransformer> chain) return null;
        ITransformer[] steps = [.. chain];
        return Loaded(context, steps) ?? steps.Select(step => Find(context, step)).FirstOrDefault(found => found is not null);
    }

    private static MiniSeqTransformer? Loaded(MLContext context, ITransformer[] steps)
    {
        if (steps.OfType<CustomMappingTransformer<SavedInput, SavedOutput>>().FirstOrDefault() is not { } mapping) return null;
        if (steps.OfType<ValueMappingTransformer>().Select(table => ReadState(context, table)).FirstOrDefault(s => s is not null) is not { } state) return null;
        var owner = Owner(context, mapping) ?? new SavedMapping([]);
        return new MiniSeqTransformer(context, owner.Open(state.AsMemory(), ComputeDevice.Of(context)), null);
    }

    private static string? ReadState(MLContext context, ValueMappingTransformer table)
    {
        var rows = context.Data.LoadFromEnumerable([new KeyRow()]);
        try
        {
            if (table.GetOutputSchema(rows.Schema).GetColumnOrNull(State) is null) return null;
        }
        catch (ArgumentOutOfRangeException)
        {
            return null; // somebody else's table, with another key column
        }
        return context.Data.CreateEnumerable<StateRow>(table.Transform(rows), reuseRowObject: false).Single().State;
    }

    private static SavedMapping? Owner(MLContext context, ITransformer mapping) => SavedMapping.Asked(() =>
    {
        var rows = context.Data.LoadFromEnumerable([new SavedInput()]);
        using var cursor = rows.GetRowCursor(rows.Schema);
        cursor.MoveNext();
        var mapper = mapping.GetRowToRowMapper(rows.Schema);
        var generated = mapper.OutputSchema[Generated];
        using var row = mapper.GetRow(cursor, [generated]);
        ReadOnlyMemory<char> text = default;
        row.GetGetter<ReadOnlyMemory<char>>(generated)(ref text);
    });

    private sealed class TextRow
    {
        public string Text { get; set; } = "";
    }

    private sealed class KeyRow
    {
        [ColumnName(SavedPipeline.Key)]
        public int Key { get; set; }
    }

    private sealed class StateRow
    {
        [ColumnName(SavedPipeline.State)]
        public string State { get; set; } = "";
    }
}
