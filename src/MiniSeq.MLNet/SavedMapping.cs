using Microsoft.ML.Data;
using Microsoft.ML.Transforms;
using MiniSeq.Models;
using static TorchSharp.torch;

namespace MiniSeq.MLNet;

/// <summary>What the mapping in the zip file reads. The names are fixed: a loaded mapping knows no others.</summary>
internal sealed class SavedInput
{
    [ColumnName(SavedPipeline.Text)]
    public ReadOnlyMemory<char> Text { get; set; }

    /// <summary>The manifest; not copied for each row.</summary>
    [ColumnName(SavedPipeline.State)]
    public ReadOnlyMemory<char> State { get; set; }
}

internal sealed class SavedOutput
{
    [ColumnName(SavedPipeline.Generated)]
    public ReadOnlyMemory<char> Generated { get; set; }
}

/// <summary>Found by ML.NET, which loads this assembly when a zip file names the contract: nothing has to be registered.</summary>
[CustomMappingFactoryAttribute(SavedPipeline.Contract)]
internal sealed class SavedMappingFactory : CustomMappingFactory<SavedInput, SavedOutput>
{
    /// <summary>Called once for each <c>Model.Load</c>.</summary>
    public override Action<SavedInput, SavedOutput> GetMapping() => new SavedMapping(ModelPlace.WhileLoading()).Map;
}

/// <summary>The model of one <c>Model.Load</c>: read at the first row, shared by all rows and by <c>FromModel</c>.</summary>
internal sealed class SavedMapping(IReadOnlyList<string> places)
{
    // Set while FromModel asks a loaded mapping, through ML.NET's own row, which object it is.
    [ThreadStatic]
    private static List<SavedMapping>? s_asked;

    private readonly Lock _lock = new();
    private GenerationSession? _session;

    public void Map(SavedInput input, SavedOutput output)
    {
        if (s_asked is { } asked)
        {
            asked.Add(this);
            return;
        }
        output.Generated = Open(input.State, null).Generate([input.Text.ToString()])[0].AsMemory();
    }

    /// <summary>The session, opened where it is not, or where it is on another device than the one wanted.</summary>
    public GenerationSession Open(ReadOnlyMemory<char> state, Device? device)
    {
        lock (_lock)
        {
            if (_session is { IsDisposed: false } open)
            {
                if (device is null || (device.type == open.Model.Device.type && device.index == open.Model.Device.index)) return open;
                open.Dispose();
            }
            return _session = Read(Manifest.Parse(state), device);
        }
    }

    /// <summary>What calls inside <paramref name="run"/> on this thread end up in.</summary>
    public static SavedMapping? Asked(Action run)
    {
        s_asked = [];
        try
        {
            run();
            return s_asked.FirstOrDefault();
        }
        finally
        {
            s_asked = null;
        }
    }

    private GenerationSession Read(Manifest manifest, Device? device)
    {
        string folder = WeightsFolder.Find(manifest.Weights, manifest.Adapted is null ? "The weights" : "The adapter", places);
        string checkpoint = manifest.Adapted is { } adapted ? WeightsFolder.Find(adapted, "The checkpoint below the adapter", places) : folder;
        var tokenizer = HuggingFaceTokenizer.FromPretrained(folder);
        var model = Checkpoint.LoadPretrained(checkpoint, manifest.Settings.DType, device);
        try
        {
            if (manifest.Adapted is not null) model.LoadAdapter(folder);
            return new GenerationSession(model, tokenizer, manifest.Settings, manifest.Adapted is { } files ? new AdaptedCheckpoint(files) : null);
        }
        catch
        {
            model.Dispose();
            throw;
        }
    }
}
