//go:build linux

package child

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/platforms"
	cachemetadata "github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/cache/remotecache"
	inlinecache "github.com/moby/buildkit/cache/remotecache/inline"
	localcache "github.com/moby/buildkit/cache/remotecache/local"
	registrycache "github.com/moby/buildkit/cache/remotecache/registry"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/control"
	"github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/executor/oci"
	"github.com/moby/buildkit/executor/resources"
	"github.com/moby/buildkit/executor/runcexecutor"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage"
	"github.com/moby/buildkit/frontend"
	dockerfile "github.com/moby/buildkit/frontend/dockerfile/builder"
	"github.com/moby/buildkit/frontend/gateway/forwarder"
	"github.com/moby/buildkit/session"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/bboltcachestorage"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/disk"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/moby/buildkit/util/network"
	"github.com/moby/buildkit/util/winlayers"
	"github.com/moby/buildkit/worker"
	"github.com/moby/buildkit/worker/base"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.etcd.io/bbolt"
)

const namespace = "buildkit"

// CacheFile is in the state directory once there was a build.
const CacheFile = "cache.db"

// options are what a BuildKit is put together of.
type options struct {
	dir         string // state
	contentDir  string // the image store's content
	runc        string // path; empty: there is none
	cacheSize   int64  // bytes; 0: by the disk's size
	authorities authorities
	store       *store
	vms         *vms
}

// newController puts a BuildKit together. Its Close closes everything in it.
func newController(ctx context.Context, o options) (*control.Controller, error) {
	w, err := newWorker(ctx, o)
	if err != nil {
		return nil, err
	}
	wc := &worker.Controller{}
	if err := wc.Add(w); err != nil {
		return nil, err
	}
	sessions, err := session.NewManager()
	if err != nil {
		return nil, err
	}
	cache, err := bboltcachestorage.NewStore(filepath.Join(o.dir, CacheFile))
	if err != nil {
		return nil, err
	}
	history, err := openDB(filepath.Join(o.dir, "history.db"))
	if err != nil {
		return nil, err
	}
	return control.NewController(control.Opt{
		SessionManager:   sessions,
		WorkerController: wc,
		Frontends: map[string]frontend.Frontend{
			"dockerfile.v0": forwarder.NewGatewayForwarder(wc.Infos(), dockerfile.Build),
		},
		// Of the places for a cache those without a cloud's SDK.
		ResolveCacheExporterFuncs: map[string]remotecache.ResolveCacheExporterFunc{
			"registry": registrycache.ResolveCacheExporterFunc(sessions, o.store.hosts),
			"local":    localcache.ResolveCacheExporterFunc(sessions),
			"inline":   inlinecache.ResolveCacheExporterFunc(),
		},
		ResolveCacheImporterFuncs: map[string]remotecache.ResolveCacheImporterFunc{
			"registry": registrycache.ResolveCacheImporterFunc(sessions, w.ContentStore(), o.store.hosts),
			"local":    localcache.ResolveCacheImporterFunc(sessions),
		},
		CacheManager:   solver.NewCacheManager(ctx, "local", cache, worker.NewCacheResultStorage(wc)),
		Entitlements:   []string{"network.host"},
		HistoryDB:      history,
		CacheStore:     cache,
		LeaseManager:   w.LeaseManager(),
		ContentStore:   w.ContentStore(),
		GarbageCollect: w.GarbageCollect,
		GracefulStop:   ctx.Done(),
	})
}

// imageWorker is BuildKit's worker with our exporter added.
type imageWorker struct {
	*base.Worker
	exporter *imageExporter

	vms         *vms
	authorities authorities
}

func (w *imageWorker) Exporter(name string, sm *session.Manager) (exporter.Exporter, error) {
	if name == ExporterName {
		return w.exporter, nil
	}
	return w.Worker.Exporter(name, sm)
}

func newWorker(ctx context.Context, o options) (*imageWorker, error) {
	dir := o.dir
	hostNetwork := network.NewHostProvider()
	networks := map[pb.NetMode]network.Provider{
		pb.NetMode_UNSET: hostNetwork,
		pb.NetMode_HOST:  hostNetwork,
		pb.NetMode_NONE:  network.NewNoneProvider(),
	}
	executor, err := newExecutor(dir, o.runc, networks)
	if err != nil {
		return nil, err
	}
	snapshotterName, snapshotter, err := newSnapshotter(dir)
	if err != nil {
		return nil, err
	}
	blobs := filepath.Join(dir, "content")
	localContent, err := local.NewStore(blobs)
	if err != nil {
		return nil, err
	}
	db, err := openDB(filepath.Join(dir, "containerd.db"))
	if err != nil {
		return nil, err
	}
	mdb := metadata.NewDB(db, localContent, map[string]snapshots.Snapshotter{snapshotterName: snapshotter})
	if err := mdb.Init(ctx); err != nil {
		return nil, err
	}
	md, err := cachemetadata.NewStore(filepath.Join(dir, "metadata.db"))
	if err != nil {
		return nil, err
	}
	id, err := base.ID(dir)
	if err != nil {
		return nil, err
	}
	gc, err := gcPolicy(dir, o.cacheSize)
	if err != nil {
		return nil, err
	}
	contentStore := containerdsnapshot.NewContentStore(mdb.ContentStore(), namespace)
	snaps := containerdsnapshot.NewSnapshotter(snapshotterName, mdb.Snapshotter(snapshotterName), namespace, nil)
	leases := leaseutil.WithNamespace(metadata.NewLeaseManager(mdb), namespace)
	applier := winlayers.NewFileSystemApplierWithWindows(contentStore, apply.NewFileSystemApplier(contentStore))
	differ := winlayers.NewWalkingDiffWithWindows(contentStore, walking.NewWalkingDiff(contentStore))

	w, err := base.NewWorker(ctx, base.WorkerOpt{
		ID:               id,
		Root:             dir,
		Platforms:        []ocispec.Platform{platforms.Normalize(platforms.DefaultSpec())},
		GCPolicy:         gc,
		NetworkProviders: networks,
		Executor:         withAuthorities(executor, o.authorities),
		Snapshotter:      snaps,
		ContentStore:     contentStore,
		Applier:          applier,
		Differ:           differ,
		ImageStore:       o.store,
		RegistryHosts:    o.store.hosts,
		LeaseManager:     leases,
		GarbageCollect:   mdb.GarbageCollect,
		MetadataStore:    md,
		MountPoolRoot:    filepath.Join(dir, "cachemounts"),
	})
	if err != nil {
		return nil, err
	}
	writer, err := containerimage.NewImageWriter(containerimage.WriterOpt{
		Snapshotter:  snaps,
		ContentStore: contentStore,
		Applier:      applier,
		Differ:       differ,
	})
	if err != nil {
		return nil, err
	}
	return &imageWorker{w, &imageExporter{writer: writer, leases: leases, from: blobs, to: o.contentDir}, o.vms, o.authorities}, nil
}

// newExecutor runs steps on this host. Without runc there are only the VMs.
func newExecutor(dir, runc string, networks map[pb.NetMode]network.Provider) (executor.Executor, error) {
	if runc == "" {
		return noExecutor{}, nil
	}
	return runcexecutor.New(runcexecutor.Opt{
		Root:                executorDir(dir),
		CommandCandidates:   []string{runc},
		ProcessMode:         oci.ProcessSandbox,
		DefaultCgroupParent: "atoll-build",
		// The zero monitor records nothing. One made by NewMonitor would move the processes of our own cgroup about.
		ResourceMonitor: &resources.Monitor{},
	}, networks)
}

// newSnapshotter prefers overlay; the native one copies whole trees but works where overlay cannot be stacked.
func newSnapshotter(dir string) (string, snapshots.Snapshotter, error) {
	root := filepath.Join(dir, "snapshots-overlayfs")
	if err := os.MkdirAll(root, 0o700); err != nil {
		return "", nil, err
	}
	if overlayutils.Supported(root) == nil {
		s, err := overlay.NewSnapshotter(root, overlay.AsynchronousRemove)
		return "overlayfs", s, err
	}
	s, err := native.NewSnapshotter(filepath.Join(dir, "snapshots-native"))
	return "native", s, err
}

func openDB(path string) (*bbolt.DB, error) {
	return bbolt.Open(path, 0o600, &bbolt.Options{FreelistType: bbolt.FreelistMapType})
}

// gcPolicy keeps the cache under its size, by default 10 GB or a fifth of the disk, whichever is less; what is easily had again goes
// first.
func gcPolicy(dir string, most int64) ([]client.PruneInfo, error) {
	if most == 0 {
		stat, err := disk.GetDiskStat(dir)
		if err != nil {
			return nil, err
		}
		most = min(10e9, stat.Total/5)
	}
	return []client.PruneInfo{
		{
			Filter:       []string{"type==source.local", "type==exec.cachemount", "type==source.git.checkout"},
			KeepDuration: 48 * time.Hour,
			MaxUsedSpace: most / 10,
		},
		{MaxUsedSpace: most},
		{All: true, MaxUsedSpace: most},
	}, nil
}
