//! stub
#![allow(missing_docs)]
use std::collections::BTreeMap;
use crate::units::*; use crate::error::*; use crate::mapfile::RawBase; use crate::store::Attachment; use uuid::Uuid;
#[derive(Clone,Debug,PartialEq,Eq,Copy)] pub enum LayerState {Active,Sealing,Sealed}
#[derive(Clone,Debug)] pub struct LayerRow {pub id:LayerId,pub parent:Option<LayerId>,pub size:Sector,pub state:LayerState,pub base:Option<RawBase>,pub created_ns:u64}
#[derive(Clone,Debug)] pub struct VolumeRow {pub name:String,pub active:LayerId,pub size:Sector,pub created_ns:u64,pub attachment:Option<Attachment>}
#[derive(Clone,Debug)] pub struct SnapshotRow {pub volume:String,pub name:String,pub layer:LayerId,pub group:Uuid,pub created_ns:u64,pub size:Sector}
#[derive(Clone,Debug)] pub enum Change {AddLayer(LayerRow),SetLayerState{layer:LayerId,state:LayerState},RemoveLayer(LayerId),AddVolume(VolumeRow),SetActive{volume:String,layer:LayerId},SetAttachment{volume:String,attachment:Option<Attachment>},RemoveVolume(String),AddSnapshot(SnapshotRow),RemoveSnapshot{volume:String,name:String}}
#[derive(Clone,Debug)] pub struct CatalogState {pub store:StoreId,pub layers:BTreeMap<LayerId,LayerRow>,pub volumes:BTreeMap<String,VolumeRow>,pub snapshots:Vec<SnapshotRow>}
pub trait Catalog: Send+std::fmt::Debug { fn state(&self)->&CatalogState; fn commit(&mut self,c:&[Change])->Result<()>; }
impl CatalogState { pub fn volume(&self,_n:&str)->Result<&VolumeRow>{todo!()} pub fn chain_of(&self,_l:LayerId)->Vec<&LayerRow>{todo!()} }
pub mod sqlite { use super::*; #[derive(Debug)] pub struct SqliteCatalog; impl SqliteCatalog { pub fn open(_d:&std::path::Path)->Result<Self>{todo!()} } impl Catalog for SqliteCatalog { fn state(&self)->&CatalogState{todo!()} fn commit(&mut self,_c:&[Change])->Result<()> {todo!()} } }
