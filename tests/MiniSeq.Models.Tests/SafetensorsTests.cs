using System.Text;
using System.Text.Json;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Models.Tests;

public class SafetensorsTests
{
    public static TheoryData<ScalarType> DTypes =>
    [
        ScalarType.Float64, ScalarType.Float32, ScalarType.Float16, ScalarType.BFloat16, ScalarType.Int64, ScalarType.Int32, ScalarType.Int16,
        ScalarType.Int8, ScalarType.Byte, ScalarType.Bool,
    ];

    [Theory]
    [MemberData(nameof(DTypes))]
    public void EveryDTypeAndShapeComesBack(ScalarType dtype)
    {
        using var folder = new TemporaryFolder();
        using var scope = NewDisposeScope();
        (string, Tensor)[] tensors =
        [
            ("vector", arange(7).to(dtype)), ("matrix", arange(6).reshape(2, 3).to(dtype)), ("scalar", tensor(1).to(dtype)),
            ("empty", zeros(3, 0, 2).to(dtype)), ("transposed", arange(6).reshape(2, 3).to(dtype).t()), ("väter \"1\" \n", ones(1).to(dtype)),
        ];
        SafetensorsWriter.Save(folder["a.safetensors"], tensors);
        using var reader = SafetensorsReader.Open(folder["a.safetensors"]);
        Assert.Equal(tensors.Length, reader.Names.Count);
        foreach (var (name, tensor) in tensors)
        {
            Assert.True(reader.Contains(name));
            Assert.Equal(dtype, reader.DType(name));
            Assert.Equal(tensor.shape, reader.Shape(name));
            AssertSame(tensor, reader.Read(name));
        }
    }

    [Fact]
    public void APointerOfGitLfsIsCalledThat()
    {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["model.safetensors"], "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n");
        Assert.Contains("git lfs pull", Assert.Throws<InvalidDataException>(() => SafetensorsReader.Open(folder.Path)).Message);
    }

    [Fact]
    public void TheFileIsWhatTheFormatSays()
    {
        using var folder = new TemporaryFolder();
        using var byteTensor = tensor(new byte[] { 1, 2, 3 });
        using var intTensor = tensor(new[] { 4 });
        SafetensorsWriter.Save(folder["a"], [("b", byteTensor), ("i", intTensor)]);
        var file = File.ReadAllBytes(folder["a"]);
        var length = BitConverter.ToInt32(file);
        Assert.Equal(0, length % 8);
        Assert.Equal("""{"__metadata__":{"format":"pt"},"i":{"dtype":"I32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}}""",
            Encoding.UTF8.GetString(file, 8, length).TrimEnd(' '));
        Assert.Equal([4, 0, 0, 0, 1, 2, 3], file[(8 + length)..]);
    }

    [Fact]
    public void MetadataComesBack()
    {
        using var folder = new TemporaryFolder();
        SafetensorsWriter.Save(folder["a"], [], new Dictionary<string, string> { ["who"] = "λ \"me\"" });
        using var reader = SafetensorsReader.Open(folder["a"]);
        Assert.Empty(reader.Names);
        Assert.Equal("λ \"me\"", Assert.Single(reader.Metadata).Value);
    }

    [Fact]
    public void ReadIntoFillsParametersAndConverts()
    {
        using var folder = new TemporaryFolder();
        using var scope = NewDisposeScope();
        var stored = arange(6, float32).reshape(2, 3);
        SafetensorsWriter.Save(folder["a"], [("w", stored)]);
        using var reader = SafetensorsReader.Open(folder["a"]);
        var same = nn.Parameter(zeros(2, 3));
        var half = nn.Parameter(zeros(2, 3, dtype: bfloat16));
        var strided = zeros(3, 2).t();
        foreach (var destination in new[] { same, half, strided })
        {
            reader.ReadInto("w", destination);
            AssertSame(stored, destination.detach().to(float32));
        }
        Assert.True(same.requires_grad);
        using var wrong = zeros(3, 2);
        var fault = Assert.Throws<InvalidDataException>(() => reader.ReadInto("w", wrong));
        Assert.Equal($"{folder["a"]}: tensor 'w' has shape [2, 3], the model wants [3, 2].", fault.Message);
        Assert.Contains("there is no tensor 'v'", Assert.Throws<KeyNotFoundException>(() => reader.Read("v")).Message);
    }

    [Fact]
    public void NothingIsLeaked()
    {
        using var folder = new TemporaryFolder();
        using var w = ones(4, 4).t();
        var before = DisposeScopeManager.Statistics.ThreadTotalLiveCount;
        SafetensorsWriter.Save(folder["a"], [("w", w)]);
        using (var reader = SafetensorsReader.Open(folder["a"]))
        {
            reader.ReadInto("w", w);
            reader.Read("w").Dispose();
        }
        Assert.Equal(before, DisposeScopeManager.Statistics.ThreadTotalLiveCount);
        Assert.Equal([folder["a"]], Directory.GetFiles(folder.Path));
    }

    [Fact]
    public void ShardsAreWrittenAsHuggingFaceDoes()
    {
        using var folder = new TemporaryFolder();
        using var scope = NewDisposeScope();
        (string, Tensor)[] tensors = [.. Enumerable.Range(0, 5).Select(i => ($"w{i}", full(10, i, float32)))];
        SafetensorsWriter.SavePretrained(folder.Path, tensors, maxShardBytes: 80);
        Assert.Equal(["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors", "model.safetensors.index.json"],
            Names(folder));
        using var index = JsonDocument.Parse(File.ReadAllText(folder["model.safetensors.index.json"]));
        Assert.Equal(200, index.RootElement.GetProperty("metadata").GetProperty("total_size").GetInt64());
        Assert.Equal("model-00002-of-00003.safetensors", index.RootElement.GetProperty("weight_map").GetProperty("w3").GetString());
        foreach (var path in new[] { folder.Path, folder["model.safetensors.index.json"] })
        {
            using var reader = SafetensorsReader.Open(path);
            Assert.Equal(["w0", "w1", "w2", "w3", "w4"], reader.Names);
            foreach (var (name, tensor) in tensors)
                AssertSame(tensor, reader.Read(name));
        }

        // Saving again in one piece leaves nothing of the shards that could be read by mistake, and the other way round.
        SafetensorsWriter.SavePretrained(folder.Path, tensors);
        Assert.Equal(["model.safetensors"], Names(folder));
        SafetensorsWriter.SavePretrained(folder.Path, tensors, maxShardBytes: 1);
        Assert.Equal(6, Names(folder).Length);
        Assert.DoesNotContain("model.safetensors", Names(folder));
    }

    [Fact]
    public void AFailedSaveLeavesTheOldFile()
    {
        using var folder = new TemporaryFolder();
        using var good = ones(2);
        SafetensorsWriter.Save(folder["a"], [("w", good)]);
        var old = File.ReadAllBytes(folder["a"]);
        using var complex = zeros(1, dtype: complex64);
        Assert.Contains("'c' has the dtype ComplexFloat32", Assert.Throws<ArgumentException>(() => SafetensorsWriter.Save(folder["a"], [("c", complex)])).Message);
        Assert.Contains("Two tensors", Assert.Throws<ArgumentException>(() => SafetensorsWriter.Save(folder["a"], [("w", good), ("w", good)])).Message);
        Assert.Throws<ArgumentException>(() => SafetensorsWriter.Save(folder["a"], [("__metadata__", good)]));
        var unreadable = new Dictionary<string, string> { ["long"] = new string('x', 100_000_000) };
        Assert.Contains("header", Assert.Throws<ArgumentException>(() => SafetensorsWriter.Save(folder["a"], [("w", good)], unreadable)).Message);
        Assert.Equal(old, File.ReadAllBytes(folder["a"]));
        Directory.CreateDirectory(folder["taken"]); // the rename at the end fails
        Assert.ThrowsAny<Exception>(() => SafetensorsWriter.Save(folder["taken"], [("w", good)]));
        Assert.Equal(["a"], Names(folder));
    }

    private const string Good = """ "a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]} """;

    /// <summary>Header, bytes of data, and the message after the file's name.</summary>
    public static TheoryData<string, int, string> Corrupt => new()
    {
        { "[]", 0, "the JSON is not an object." },
        { "", 0, "malformed JSON" },
        { "{" + Good, 8, "malformed JSON" },
        { "{" + Good + "," + Good + "}", 8, "malformed JSON: Duplicate property 'a'" },
        { "{" + Good + "}", 7, "tensor 'a' ends at byte 8 of the data, the file holds 7." },
        { "{" + Good + "}", 9, "the tensors end at byte 8 of the data, the file holds 9." },
        { """{"a":[]}""", 0, "tensor 'a' is not described by an object." },
        { """{"a":{"shape":[2],"data_offsets":[0,8]}}""", 8, "tensor 'a' has no string 'dtype'." },
        { """{"a":{"dtype":3,"shape":[2],"data_offsets":[0,8]}}""", 8, "tensor 'a' has no string 'dtype'." },
        { """{"a":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}}""", 8, "tensor 'a' has the dtype 'F8_E4M3', which is not supported" },
        { """{"a":{"dtype":"F32","data_offsets":[0,8]}}""", 8, "tensor 'a' has no array 'shape'." },
        { """{"a":{"dtype":"F32","shape":"2","data_offsets":[0,8]}}""", 8, "tensor 'a' has no array 'shape'." },
        { """{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}""", 8, "tensor 'a' has '-2' in 'shape', which is no count." },
        { """{"a":{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}}""", 8, "tensor 'a' has '2.5' in 'shape', which is no count." },
        { """{"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8]}}""", 8, "tensor 'a' has '99999999999999999999' in 'shape', which is no count." },
        { """{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}""", 8, "tensor 'a' of shape [4611686018427387904, 4] has more bytes than can be counted." },
        { """{"a":{"dtype":"F32","shape":[0,4611686018427387904,4],"data_offsets":[0,0]}}""", 0, "has more bytes than can be counted." },
        { """{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}""", 8, "tensor 'a' of shape [3] needs 12 bytes, its data_offsets [0, 8] hold 8." },
        { """{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}""", 8, "tensor 'a' has data_offsets [8, 0], which are not [begin, end]." },
        { """{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}}""", 9, "tensor 'a' has data_offsets [0, 8, 9], which are not [begin, end]." },
        { """{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}""", 12, "tensor 'a' begins at byte 4 of the data where 0 is due: there is a gap." },
        { "{" + Good + ""","b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}""", 12, "tensor 'b' begins at byte 4 of the data where 8 is due: it overlaps its neighbour." },
        { """{"__metadata__":{"a":1}}""", 0, "__metadata__ entry 'a' is not a string." },
        { """{"__metadata__":"a"}""", 0, "__metadata__ is not an object of strings." },
        { """{"a":{"dtype":"U8","shape":[1ONES],"data_offsets":[0,1]}}""".Replace("ONES", string.Concat(Enumerable.Repeat(",1", 64))), 1, "tensor 'a' has 65 numbers in 'shape'; at most 64 are allowed." },
        { """{"\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}""", 1, "malformed JSON" },
    };

    [Theory]
    [MemberData(nameof(Corrupt))]
    public void ADamagedHeaderIsRefusedWithItsFault(string header, int dataBytes, string message)
    {
        using var folder = new TemporaryFolder();
        File.WriteAllBytes(folder["bad"], Raw(header, dataBytes));
        var fault = Assert.Throws<InvalidDataException>(() => SafetensorsReader.Open(folder["bad"]));
        Assert.StartsWith($"{folder["bad"]}: ", fault.Message);
        Assert.Contains(message, fault.Message);
    }

    [Theory]
    [InlineData(new byte[0], "has 0 bytes and no room")]
    [InlineData(new byte[] { 1, 0, 0, 0, 0, 0, 0 }, "has 7 bytes and no room")]
    [InlineData(new byte[] { 1, 0, 0, 0, 0, 0, 0, 0 }, "the header would have 1 bytes, the file has 8")]
    [InlineData(new byte[] { 255, 255, 255, 255, 255, 255, 255, 255 }, "the header would have 18446744073709551615 bytes; at most 100000000 are allowed")]
    [InlineData(new byte[] { 3, 0, 0, 0, 0, 0, 0, 0, (byte)'{', 0xFF, (byte)'}' }, "malformed JSON")]
    public void ADamagedBeginningIsRefused(byte[] file, string message)
    {
        using var folder = new TemporaryFolder();
        File.WriteAllBytes(folder["bad"], file);
        Assert.Contains(message, Assert.Throws<InvalidDataException>(() => SafetensorsReader.Open(folder["bad"])).Message);
    }

    [Theory]
    [InlineData("""{}""", "has no object 'weight_map'")]
    [InlineData("""{"weight_map":[]}""", "has no object 'weight_map'")]
    [InlineData("""{"weight_map":{"a":3}}""", "tensor 'a': '3' is no file name of a shard")]
    [InlineData("""{"weight_map":{"a":"../one.safetensors"}}""", "is no file name of a shard")]
    [InlineData("""{"weight_map":{"a":"/etc/passwd"}}""", "is no file name of a shard")]
    [InlineData("""{"weight_map":{"a":"..\\one.safetensors"}}""", "is no file name of a shard")]
    [InlineData("""{"weight_map":{"a":".."}}""", "is no file name of a shard")]
    [InlineData("""{"weight_map":{"a":"one","b":"one"}}""", "tensor 'b' is said to be in 'one' and is not")]
    [InlineData("""{"weight_map":{"a":"one","c":"two"}}""", "tensor 'a' is also in")]
    [InlineData("""{"weight_map":{"a":"one","a":"two"}}""", "Duplicate")]
    public void ADamagedIndexIsRefused(string index, string message)
    {
        using var folder = new TemporaryFolder();
        File.WriteAllBytes(folder["one"], Raw("{" + Good + "}", 8));
        File.WriteAllBytes(folder["two"], Raw("{" + Good + ""","c":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}""", 9));
        File.WriteAllText(folder["model.safetensors.index.json"], index);
        Assert.Contains(message, Assert.Throws<InvalidDataException>(() => SafetensorsReader.Open(folder.Path)).Message);
    }

    [Fact]
    public void MissingFilesAreNamed()
    {
        using var folder = new TemporaryFolder();
        Assert.Contains("neither model.safetensors nor", Assert.Throws<FileNotFoundException>(() => SafetensorsReader.Open(folder.Path)).Message);
        Assert.Contains("no such file", Assert.Throws<FileNotFoundException>(() => SafetensorsReader.Open(folder["x"])).Message);
        File.WriteAllText(folder["model.safetensors.index.json"], """{"weight_map":{"a":"gone"}}""");
        Assert.Contains("the shard 'gone'", Assert.Throws<FileNotFoundException>(() => SafetensorsReader.Open(folder.Path)).Message);
    }

    [Fact]
    public void MutatedFilesAreReadOrRefused()
    {
        const int files = 12_000;
        using var folder = new TemporaryFolder();
        var random = new Random(20240711);
        var whole = Raw("""{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BOOL","shape":[],"data_offsets":[24,25]},"c":{"dtype":"I16","shape":[0],"data_offsets":[25,25]}}""", 25);
        var read = 0;
        for (var i = 0; i < files; i++)
        {
            File.WriteAllBytes(folder["fuzz"], Mutate(whole, random));
            try
            {
                using var reader = SafetensorsReader.Open(folder["fuzz"]);
                foreach (var name in reader.Names)
                    reader.Read(name).Dispose();
                read++;
            }
            catch (InvalidDataException fault)
            {
                Assert.StartsWith(folder["fuzz"], fault.Message);
            }
        }
        Assert.InRange(read, files / 100, files * 9 / 10); // both outcomes were exercised
    }

    [Theory]
    [InlineData("reference/llama3/expected.safetensors", "logits")]
    [InlineData("reference/qwen2", "model.embed_tokens.weight")]
    [InlineData("models/stories260K", "model.norm.weight")]
    public void ReferenceFilesAreReadAndWrittenBack(string path, string name)
    {
        using var folder = new TemporaryFolder();
        using var scope = NewDisposeScope();
        using var reader = SafetensorsReader.Open(Shared.Path(path));
        Assert.Contains(name, reader.Names);
        var tensors = reader.Names.Select(name => (name, reader.Read(name))).ToList();
        Assert.All(tensors, entry => Assert.True(entry.Item2.to(float32).isfinite().all().ToBoolean()));
        SafetensorsWriter.SavePretrained(folder.Path, tensors);
        using var again = SafetensorsReader.Open(folder.Path);
        foreach (var (written, tensor) in tensors)
            AssertSame(tensor, again.Read(written));
    }

    private static string[] Names(TemporaryFolder folder) => [.. Directory.GetFiles(folder.Path).Select(file => Path.GetFileName(file)).Order(StringComparer.Ordinal)];

    private static byte[] Raw(string header, int dataBytes)
    {
        var text = Encoding.UTF8.GetBytes(header);
        return [.. BitConverter.GetBytes((ulong)text.Length), .. text, .. new byte[dataBytes]];
    }

    private static byte[] Mutate(byte[] whole, Random random)
    {
        var file = whole.ToList();
        for (var edits = random.Next(1, 4); edits > 0 && file.Count > 0; edits--)
        {
            // Mostly digits and punctuation in the header: bytes at random seldom get past the JSON parser.
            var at = random.Next(4) == 0 ? random.Next(Math.Min(8, file.Count)) : random.Next(file.Count);
            var value = random.Next(3) == 0 ? (byte)random.Next(256) : (byte)"0123456789-,.:{}[]\"eFI"[random.Next(22)];
            switch (random.Next(5))
            {
                case 0: file.Insert(at, value); break;
                case 1: file.RemoveAt(at); break;
                case 2: file.RemoveRange(at, Math.Min(random.Next(20), file.Count - at)); break;
                default: file[at] = value; break;
            }
        }
        return [.. file];
    }

    private static void AssertSame(Tensor expected, Tensor actual)
    {
        using var _ = NewDisposeScope();
        Assert.Equal(expected.shape, actual.shape);
        Assert.Equal(expected.dtype, actual.dtype);
        Assert.True((expected == actual).all().ToBoolean());
    }
}
